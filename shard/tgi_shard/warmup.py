"""How many KV blocks fit: run a step as large as any to come, and turn the memory that is left into blocks.

memory.py has the rules. On a CPU the step is a short one: it is to load what is loaded on first use, and a
long one would delay the start by many seconds to measure activations that are small beside the half of the
memory that stays free.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from tgi_shard.distributed import Group
from tgi_shard.engine import Engine
from tgi_shard.memory import (
    Limits,
    MemoryPlan,
    available_cpu_bytes,
    blocks_within,
    cpu_kv_budget,
    held_bytes,
    lengths,
    shortage,
    slot_bytes,
)
from tgi_shard.models.registry import LoadedModel
from tgi_shard.plan import AddSequence, StepPlan
from tgi_shard.sampling.parameters import SamplingParameters
from tgi_shard.sampling.sampler import Sampler
from tgi_shard.slots import Slots

log = logging.getLogger(__name__)

CPU_STEP_TOKENS = 64

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

    `on_step` is told the seconds of the largest step. Raises NotEnoughMemory, on all ranks or on none.
    """
    # On the device a sequence has its decoder's start tokens as well.
    num_start_tokens = len(loaded.decoder_start_token_ids)
    if limits.max_total_tokens:
        limits = replace(limits, max_total_tokens=limits.max_total_tokens + num_start_tokens)
    kv_shape = loaded.model.kv_shape
    block_size, longest = lengths(kv_shape, device, limits, loaded.max_position_embeddings)
    activations = _run_largest_step(loaded, sampler, group, device, block_size, limits, on_step)
    if device.type == "cuda":
        reserve = int((1 - memory_fraction) * torch.cuda.mem_get_info(device)[1])
        left = _free_cuda_bytes(device) - reserve - activations
        own_kv_bytes = left - slot_bytes(limits, longest, block_size)
    else:
        left = available_cpu_bytes()
        own_kv_bytes = cpu_kv_budget(left, group.world_size) if cpu_kv_bytes is None else cpu_kv_bytes
    kv_bytes = group.all_reduce_min(max(0, own_kv_bytes))
    blocks = blocks_within(kv_bytes, kv_shape, block_size, device, limits, longest)
    if (problem := shortage(blocks, limits)) is not None:
        raise NotEnoughMemory(problem)
    num_blocks, max_total_tokens = blocks.num_blocks, blocks.max_total_tokens
    workspace = slot_bytes(limits, max_total_tokens, block_size)
    if device.type == "cpu":
        reserve = max(0, left // group.world_size - blocks.num_bytes - workspace)
    plan = MemoryPlan(
        device=device,
        weights=held_bytes(loaded.model),
        activations=activations if device.type == "cuda" else None,
        workspace=workspace,
        reserve=reserve,
        blocks=blocks,
        limits=limits,
    )
    log.info("Memory of this shard:\n%s", plan.describe())
    kv_cache = kv_shape.allocate(num_blocks, block_size, device)
    slots = Slots(
        max_sequences=limits.max_sequences,
        max_total_tokens=max_total_tokens,
        num_blocks=num_blocks,
        block_size=block_size,
        vocab_size=loaded.vocab_size,
        device=device,
        num_start_tokens=num_start_tokens,
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

    On a CPU a shorter step: `on_step` gets what the largest would take, by its number of tokens. Returns the
    bytes that the step needed above those that it found and left behind; 0 on a CPU.
    """
    num_tokens = limits.max_step_tokens
    if device.type == "cpu":
        num_tokens = min(num_tokens, CPU_STEP_TOKENS)
    longest = limits.max_total_tokens or loaded.max_position_embeddings or num_tokens + 1
    num_start_tokens = len(loaded.decoder_start_token_ids)
    shortest = 1 + num_start_tokens
    num_rows = max(min(limits.max_sequences, num_tokens // shortest), 1)
    if not loaded.model.kv_shape.can_share_prefixes:
        # A row costs a whole state, which may be large: no more of them than half of what is free holds.
        is_cuda = device.type == "cuda"
        free_bytes = torch.cuda.mem_get_info(device)[0] if is_cuda else available_cpu_bytes()
        num_states = free_bytes // 2 // group.world_size // loaded.model.kv_shape.bytes_per_block(block_size)
        num_rows = group.all_reduce_min(min(num_rows, max(num_states, 1)))
    lengths = np.full(num_rows, num_tokens // num_rows)
    lengths[: num_tokens % num_rows] += 1
    lengths = np.minimum(lengths, longest - 1)
    lengths = lengths[lengths >= shortest]
    num_rows = len(lengths)
    num_blocks = -(-(lengths + 1) // block_size)
    slots = Slots(
        max_sequences=num_rows,
        max_total_tokens=int(lengths.max()) + 1,
        num_blocks=int(num_blocks.sum()),
        block_size=block_size,
        vocab_size=loaded.vocab_size,
        device=device,
        num_start_tokens=num_start_tokens,
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
        on_step((time.monotonic() - began_at) * limits.max_step_tokens / num_tokens)
        if result.failed:
            raise RuntimeError(f"the model fails at warm-up: {result.failed[0].message}")
    return torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0


def _reset_cuda_peak(device: torch.device) -> int:
    """Bytes allocated now."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _free_cuda_bytes(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
