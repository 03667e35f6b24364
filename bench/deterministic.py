"""What `--deterministic` costs: steps of one engine with it and of one without, in turns.

    python bench/make_model.py qwen2.5-0.5b /tmp/bench-model
    python bench/deterministic.py /tmp/bench-model --threads 1

Prints the processor time of each step, which a busy machine spoils less than it does the time on the clock:
the least and the median over the rounds, and the ratios.
"""

import argparse
import random
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from tgi_shard.distributed import SINGLE
from tgi_shard.engine import Engine
from tgi_shard.models.registry import load_model
from tgi_shard.plan import AddSequence, StepPlan
from tgi_shard.sampling.sampler import Sampler
from tgi_shard.slots import Slots

NUM_BLOCKS, MAX_TOTAL_TOKENS = 600, 4096
CHUNK = 512  # tokens of a prompt in a step
NUM_DECODES = 4  # steps that are measured together
LOADS = [(1, 512), (16, 128), (1, 2048)]  # sequences, tokens that each has


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    engines = {
        deterministic: load(options.model, getattr(torch, options.dtype), deterministic)
        for deterministic in (False, True)
    }
    for deterministic, engine in engines.items():  # what is loaded, compiled or tried on first use
        began_at = time.process_time()
        measure(engine, 16, 128)
        print(f"first use, deterministic={deterministic}: {time.process_time() - began_at:.1f} s")
    print(f"{options.model.name}, {options.dtype}, {options.threads} threads; ms of processor time")
    for count, length in LOADS:
        rounds: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for _ in range(options.rounds):
            for deterministic, engine in engines.items():
                rounds[deterministic].append(measure(engine, count, length))
        for what, column in ((f"prefill, {min(CHUNK, count * length)} tokens a step", 0), ("decode", 1)):
            without, with_it = ([one[column] for one in rounds[key]] for key in (False, True))
            print(
                f"  {count:2} sequences of {length:4} tokens, {what:30} "
                f"{min(without):8.1f} {min(with_it):8.1f}  x{min(with_it) / min(without):.2f}   median "
                f"{statistics.median(without):8.1f} {statistics.median(with_it):8.1f}  "
                f"x{statistics.median(with_it) / statistics.median(without):.2f}",
                flush=True,
            )


def load(path: Path, dtype: torch.dtype, deterministic: bool) -> Engine:
    device = torch.device("cpu")
    loaded = load_model(path, dtype=dtype, device=device, group=SINGLE, deterministic=deterministic)
    block_size = loaded.model.kv_shape.block_size(device, 0)
    slots = Slots(
        max_sequences=16,
        max_total_tokens=MAX_TOTAL_TOKENS,
        num_blocks=NUM_BLOCKS,
        block_size=block_size,
        vocab_size=loaded.vocab_size,
        device=device,
    )
    kv_cache = loaded.model.kv_shape.allocate(NUM_BLOCKS, block_size, device)
    return Engine(loaded.model, kv_cache, slots, Sampler(), SINGLE)


def measure(engine: Engine, count: int, length: int) -> tuple[float, float]:
    """Milliseconds of processor time for a step of prompts, and for one of decodes."""
    engine.forget()
    block_size = engine.slots.block_size
    per_step = max(1, CHUNK // length)  # sequences whose prompts go into a step, or a part of one's
    draw = random.Random(0)
    prompts = [np.array([draw.randrange(1000) for _ in range(length)]) for _ in range(count)]
    free = iter(range(NUM_BLOCKS))
    held = [0] * count
    step_id = 0
    prefills = []

    def run(sequences: list[int], num_tokens: int, upto: int, add: bool) -> float:
        nonlocal step_id
        step_id += 1
        needed = [-(-upto // block_size) - held[one] for one in sequences]
        for one, more in zip(sequences, needed, strict=True):
            held[one] += more
        plan = StepPlan(
            step_id=step_id,
            drop_sequence_ids=[],
            add=[AddSequence(one, prompts[one], np.empty(0, np.int64)) for one in sequences] if add else [],
            run_sequence_ids=sequences,
            run_num_tokens=np.full(len(sequences), num_tokens),
            run_num_new_blocks=np.array(needed),
            new_block_ids=np.array([next(free) for _ in range(sum(needed))], np.int64),
        )
        began_at = time.process_time()
        result = engine.finish(engine.step(plan))
        took = time.process_time() - began_at
        assert not result.failed, result.failed
        return took

    for first in range(0, count, per_step):
        sequences = list(range(first, min(first + per_step, count)))
        for start in range(0, length, CHUNK):
            num_tokens = min(CHUNK, length - start)
            prefills.append(run(sequences, num_tokens, start + num_tokens, add=start == 0))
    decodes = [run(list(range(count)), 1, length + 1 + step, add=False) for step in range(NUM_DECODES)]
    return 1000 * statistics.median(prefills), 1000 * statistics.median(decodes)


if __name__ == "__main__":
    main()
