"""The memory contract of a rank: what it keeps where, and how many tokens and requests that holds.

The warm-up fills in what it measured, `estimate.py` what it expects. Both turn memory into KV blocks by the
rules in this file.

CUDA: `memory_fraction` of the whole device, less what is in use after a step at its largest.

CPU: half of the RAM that is available, shared by the ranks of this machine, and at most MAX_CPU_KV_BYTES a
rank unless the caller says otherwise: a server on a CPU has neighbours, and 4 GiB are 350,000 tokens of a
model of half a billion parameters.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tgi_shard.models.model import MemoryShape
from tgi_shard.slots import NUM_SURPLUS_TOKENS

MAX_CPU_KV_BYTES = 4 * 2**30
CPU_SHARE = 0.5
MIN_BLOCKS = 2
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Limits:
    """As in WarmupRequest."""

    max_step_tokens: int
    max_total_tokens: int  # 0: what the blocks and the model allow
    max_sequences: int


@dataclass(frozen=True, slots=True)
class Blocks:
    """The part of the memory that holds keys and values."""

    num_blocks: int
    block_size: int
    bytes_per_block: int
    budget_bytes: int  # what was left for them
    max_total_tokens: int  # of one sequence

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.bytes_per_block

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A rank's. In bytes."""

    device: torch.device
    weights: int
    activations: int | None  # of a step at its largest; None: not set apart, they come out of the reserve
    workspace: int  # token ids and block tables of the sequences
    reserve: int  # left alone: for other processes, on a CPU for activations as well
    blocks: Blocks
    limits: Limits

    @property
    def max_requests(self) -> int:
        """How many of the longest length run at a time."""
        blocks = self.blocks
        per_request = max(1, -(-blocks.max_total_tokens // blocks.block_size))
        return min(self.limits.max_sequences, blocks.num_blocks // per_request)

    def describe(self) -> str:
        blocks, limits = self.blocks, self.limits
        rows = [
            ("weights", self.weights, ""),
            ("KV blocks", blocks.num_bytes, f"{blocks.num_blocks} of {blocks.block_size} tokens each"),
            ("workspace", self.workspace, f"token ids and block tables of {limits.max_sequences} sequences"),
        ]
        if self.activations is None:
            rows.append(("reserve", self.reserve, "activations, and what is left to other processes"))
        else:
            rows.append(("activations", self.activations, f"a step of {limits.max_step_tokens} tokens"))
            rows.append(("reserve", self.reserve, "left free"))
        return "\n".join(
            [
                *(f"  {name:<12}{human(size):>11}  {note}".rstrip() for name, size, note in rows),
                f"  room for {blocks.num_tokens} tokens: {self.max_requests} concurrent requests of the "
                f"longest length ({blocks.max_total_tokens} tokens)",
            ]
        )


def human(num_bytes: int) -> str:
    """`13.21 GiB`."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes >= 1 << power:
            return f"{num_bytes / (1 << power):.2f} {unit}"
    return f"{num_bytes} B"


def held_bytes(root: object) -> int:
    """Memory behind all tensors that are reachable from `root`; what several of them share counts once.

    Of a mapped file, only the range that the tensors cover. What oneDNN pads its packed weights with is not
    seen.
    """
    packed = 0
    ranges: dict[int, tuple[int, int]] = {}
    for tensor in tensors_in(root):
        if tensor.layout is not torch.strided:  # oneDNN's: it shares nothing
            packed += tensor.numel() * tensor.itemsize
        elif tensor.numel() > 0:
            start = int(tensor.storage_offset()) * tensor.itemsize
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            last = sum((size - 1) * stride for size, stride in steps)
            stop = start + (last + 1) * tensor.itemsize
            storage = tensor.untyped_storage()._cdata
            known = ranges.get(storage, (start, stop))
            ranges[storage] = min(start, known[0]), max(stop, known[1])
    return packed + sum(stop - start for start, stop in ranges.values())


def tensors_in(root: object) -> list[Tensor]:
    """The tensors in an object's fields, lists, tuples and dicts, however deep; each once."""
    found: list[Tensor] = []
    seen: set[int] = set()
    waiting: list[Any] = [root]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list | tuple | set | frozenset):
            waiting += item
        else:
            waiting += getattr(item, "__dict__", {}).values()
            names = (name for kind in type(item).__mro__ for name in getattr(kind, "__slots__", ()))
            waiting += (getattr(item, name) for name in names if hasattr(item, name))
    return found


def cpu_kv_budget(free_bytes: int, num_ranks: int) -> int:
    """A rank's share of what is available once the weights are there."""
    return max(0, min(int(free_bytes * CPU_SHARE) // num_ranks, MAX_CPU_KV_BYTES))


def lengths(
    shape: MemoryShape, device: torch.device, limits: Limits, max_position_embeddings: int
) -> tuple[int, int]:
    """Tokens of a block, and of the longest sequence that the limits and the model allow; 0: nothing does."""
    longest = limits.max_total_tokens or max_position_embeddings
    block_size = shape.block_size(device, longest)
    # Where blocks cannot be shared a sequence has one of them, however long it grows.
    return block_size, longest if shape.can_share_prefixes else block_size


def blocks_within(
    kv_bytes: int, shape: MemoryShape, block_size: int, device: torch.device, limits: Limits, longest: int
) -> Blocks:
    bytes_per_block = shape.bytes_per_block(block_size)
    num_blocks = max(0, kv_bytes) // bytes_per_block
    if longest and (device.type == "cpu" or not shape.can_share_prefixes):  # the rest would lie idle
        num_blocks = min(num_blocks, limits.max_sequences * -(-longest // block_size))
    num_tokens = num_blocks * block_size
    return Blocks(
        num_blocks=num_blocks,
        block_size=block_size,
        bytes_per_block=bytes_per_block,
        budget_bytes=max(0, kv_bytes),
        max_total_tokens=limits.max_total_tokens or min(num_tokens, longest or num_tokens),
    )


def shortage(blocks: Blocks, limits: Limits) -> str | None:
    """Why the memory for blocks does not do; None if it does."""
    num_blocks = blocks.budget_bytes // blocks.bytes_per_block
    if num_blocks >= MIN_BLOCKS and num_blocks * blocks.block_size >= limits.max_total_tokens:
        return None
    return (
        f"Not enough memory to handle `max_total_tokens={limits.max_total_tokens}`: "
        f"{blocks.budget_bytes / 2**20:.0f} MiB are left for the KV cache, which is {num_blocks} blocks of "
        f"{blocks.block_size} tokens"
    )


def slot_bytes(limits: Limits, longest: int, block_size: int) -> int:
    """Of the tensors of `Slots`: token ids (int32) and block tables (int64) of all sequences."""
    max_tokens = longest + NUM_SURPLUS_TOKENS
    return limits.max_sequences * (max_tokens * 4 + (-(-max_tokens // block_size) + 1) * 8)


def available_cpu_bytes() -> int:
    """What may be taken without swapping: of the machine, or of the container where that is less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    available = int(fields["MemAvailable"].removesuffix("kB")) * 1024
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
    except FileNotFoundError:  # no container, or one of the old kind
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - used))
