"""How many KV blocks fit: run a step as large as any to come, and turn the memory that is left into blocks.

CUDA: `memory_fraction` of the whole device, less what is in use after the step at its largest.

CPU: half of the RAM that is available, shared by the ranks of this machine, and at most MAX_CPU_KV_BYTES a
rank unless the caller says otherwise: a server on a CPU has neighbours, and 4 GiB are 350,000 tokens of a
model of half a billion parameters. The step is a short one there. It is to load what is loaded on first use;
a long one would delay the start by many seconds to measure activations that are small beside the other half.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tgi_shard.distributed import Group
from tgi_shard.engine import Engine
from tgi_shard.models.registry import LoadedModel
from tgi_shard.plan import AddSequence, StepPlan
from tgi_shard.sampling.parameters import SamplingParameters
from tgi_shard.sampling.sampler import Sampler
from tgi_shard.slots import Slots

log = logging.getLogger(__name__)

MAX_CPU_KV_BYTES = 4 * 2**30
CPU_SHARE = 0.5
CPU_STEP_TOKENS = 256
MIN_BLOCKS = 2

# One row that passes through every processor, beside rows that pass through none.
_EVERYTHING = SamplingParameters(
    do_sample=True,
    temperature=0.9,
    top_k=10,
    top_p=0.9,
    typical_p=0.9,
    repetition_penalty=1.2,
    frequency_penalty=0.1,
    output_frequency_penalty=0.1,
    output_presence_penalty=0.1,
    watermark=True,
)


class NotEnoughMemory(Exception):
    """The memory left does not hold the KV that was asked for."""


@dataclass(frozen=True, slots=True)
class Limits:
    """As in WarmupRequest."""

    max_step_tokens: int
    max_total_tokens: int  # 0: what the blocks and the model allow
    max_sequences: int


def warm_up(
    loaded: LoadedModel,
    sampler: Sampler,
    group: Group,
    device: torch.device,
    limits: Limits,
    *,
    memory_fraction: float,
    cpu_kv_bytes: int | None = None,
    on_step: Callable[[float], None] = lambda _: None,
) -> Engine:
    """An engine with as many KV blocks as the rank with the least memory holds. All ranks call it at once.

    `on_step` is told how many seconds each step took. Raises NotEnoughMemory, on all ranks or on none.
    """
    kv_shape = loaded.model.kv_shape
    longest = limits.max_total_tokens or loaded.max_position_embeddings
    block_size = kv_shape.block_size(device, longest)
    if not kv_shape.can_share_prefixes:
        longest = block_size  # a sequence has one block, however long it grows

    peak_bytes = _run_largest_step(loaded, sampler, group, device, block_size, limits, on_step)
    if device.type == "cuda":
        slot_bytes = limits.max_sequences * longest * 4  # their token ids
        kv_bytes = _free_cuda_bytes(device, memory_fraction) - peak_bytes - slot_bytes
    elif cpu_kv_bytes is not None:
        kv_bytes = cpu_kv_bytes
    else:
        kv_bytes = min(int(_available_cpu_bytes() * CPU_SHARE) // group.world_size, MAX_CPU_KV_BYTES)
    bytes_per_block = kv_shape.bytes_per_block(block_size)
    num_blocks = group.all_reduce_min(max(0, kv_bytes) // bytes_per_block)
    if num_blocks < MIN_BLOCKS or num_blocks * block_size < limits.max_total_tokens:
        raise NotEnoughMemory(
            f"Not enough memory to handle `max_total_tokens={limits.max_total_tokens}`: "
            f"{max(0, kv_bytes) / 2**20:.0f} MiB are left for the KV cache, which is {num_blocks} blocks of "
            f"{block_size} tokens"
        )
    if longest and (device.type == "cpu" or not kv_shape.can_share_prefixes):  # the rest would lie idle
        num_blocks = min(num_blocks, limits.max_sequences * -(-longest // block_size))
    max_total_tokens = limits.max_total_tokens or min(
        num_blocks * block_size, longest or num_blocks * block_size
    )
    log.info(
        "KV-cache blocks: %d, size: %d (%.2f GiB)",
        num_blocks,
        block_size,
        num_blocks * bytes_per_block / 2**30,
    )
    kv_cache = kv_shape.allocate(num_blocks, block_size, device)
    slots = Slots(
        max_sequences=limits.max_sequences,
        max_total_tokens=max_total_tokens,
        num_blocks=num_blocks,
        block_size=block_size,
        vocab_size=loaded.vocab_size,
        device=device,
    )
    return Engine(loaded.model, kv_cache, slots, sampler, group)


def _run_largest_step(
    loaded: LoadedModel,
    sampler: Sampler,
    group: Group,
    device: torch.device,
    block_size: int,
    limits: Limits,
    on_step: Callable[[float], None],
) -> int:
    """Run a step of max_step_tokens in as many sequences as may be, then a decode of each.

    The bytes that the step needed above those that it found and left behind; 0 on a CPU.
    """
    num_tokens = limits.max_step_tokens
    if device.type == "cpu":
        num_tokens = min(num_tokens, CPU_STEP_TOKENS)
    longest = limits.max_total_tokens or loaded.max_position_embeddings or num_tokens + 1
    num_rows = max(min(limits.max_sequences, num_tokens), 1)
    lengths = np.full(num_rows, num_tokens // num_rows)
    lengths[: num_tokens % num_rows] += 1
    lengths = np.minimum(lengths, longest - 1)
    lengths = lengths[lengths > 0]
    num_rows = len(lengths)
    num_blocks = -(-(lengths + 1) // block_size)
    slots = Slots(
        max_sequences=num_rows,
        max_total_tokens=int(lengths.max()) + 1,
        num_blocks=int(num_blocks.sum()),
        block_size=block_size,
        vocab_size=loaded.vocab_size,
        device=device,
    )
    kv_cache = loaded.model.kv_shape.allocate(slots.num_kv_blocks, block_size, device)
    engine = Engine(loaded.model, kv_cache, slots, sampler, group)
    prefill = StepPlan(
        step_id=1,
        drop_sequence_ids=[],
        add=[
            AddSequence(
                sequence_id=row,
                prompt_token_ids=np.zeros(length, np.int64),
                output_token_ids=np.empty(0, np.int64),
                sampling=_EVERYTHING if row == 0 else SamplingParameters(),
                top_n_tokens=5 if row == 0 else 0,
            )
            for row, length in enumerate(lengths.tolist())
        ],
        run_sequence_ids=list(range(num_rows)),
        run_num_tokens=lengths,
        run_num_new_blocks=num_blocks,
        new_block_ids=np.arange(num_blocks.sum()),
    )
    decode = StepPlan(
        2, [], [], list(range(num_rows)), np.ones_like(lengths), np.zeros_like(lengths), np.empty(0, int)
    )
    before = _reset_cuda_peak(device)
    for plan in (prefill, decode):
        began_at = time.monotonic()
        result = engine.finish(engine.step(plan))
        on_step(time.monotonic() - began_at)
        if result.failed:
            raise RuntimeError(f"the model fails at warm-up: {result.failed[0].message}")
    return torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0


def _reset_cuda_peak(device: torch.device) -> int:
    """Bytes allocated now."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _free_cuda_bytes(device: torch.device, memory_fraction: float) -> int:
    """What this process may still take if it leaves 1 - memory_fraction of the device alone."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(free - (1 - memory_fraction) * total)


def _available_cpu_bytes() -> int:
    """What may be taken without swapping: of the machine, or of the container where that is less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    available = int(fields["MemAvailable"].removesuffix("kB")) * 1024
    cgroup = Path("/sys/fs/cgroup")
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
    except FileNotFoundError:  # no container, or one of the old kind
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - used))
