"""What a model would take in memory, without reading its weights.

The very code that loads it builds it on torch's meta device, where a tensor has a shape and no bytes. So
weights are exact, and KV blocks up to what else the machine does meanwhile. Activations (set apart on CUDA
alone) are a rough guess from the widths of the layers; the warm-up measures them.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from tgi_shard.distributed import Group
from tgi_shard.memory import (
    Limits,
    MemoryPlan,
    available_cpu_bytes,
    blocks_within,
    cpu_kv_budget,
    held_bytes,
    human,
    lengths,
    shortage,
    slot_bytes,
    tensors_in,
)
from tgi_shard.models.registry import LoadedModel, load_model
from tgi_shard.models.rope_override import RopeOverride

# What a rank's process takes on a CPU beside weights and blocks: the interpreter and its libraries.
CPU_PROCESS_BYTES = 300 * 2**20

# Tensors of a layer's widest size that live at a time; copies of the logits that sampling makes, in float32.
NUM_WIDE = 4
NUM_LOGITS = 6


@dataclass(frozen=True, slots=True)
class Estimate:
    plan: MemoryPlan  # of the rank with most weights
    num_ranks: int
    dtype: torch.dtype
    free_bytes: int  # now, on the device; on a CPU all ranks share them
    problem: str | None  # why it does not fit; None: it does

    def describe(self) -> str:
        verdict = "It fits." if self.problem is None else f"It does not fit. {self.problem}."
        each = "The shard" if self.num_ranks == 1 else f"Each of {self.num_ranks} shards"
        name = "CPU" if self.plan.device.type == "cpu" else str(self.plan.device)
        shared = ", for all of them" if self.num_ranks > 1 and self.plan.device.type == "cpu" else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{each} on the {name} in {dtype} ({human(self.free_bytes)} are free{shared}):\n"
            f"{self.plan.describe()}\n{verdict}"
        )


def estimate(
    model_path: Path,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    num_ranks: int,
    rope_override: RopeOverride | None,
    trust_remote_code: bool = False,
    deterministic: bool = False,
    memory_fraction: float,
    limits: Limits,
) -> Estimate:
    """Raises what load_model raises."""
    ranks = [
        load_model(
            model_path,
            dtype=dtype,
            device=torch.device("meta"),
            group=Group(rank, num_ranks),
            rope_override=rope_override,
            trust_remote_code=trust_remote_code,
            deterministic=deterministic,
        )
        for rank in range(num_ranks)
    ]
    weights = [held_bytes(rank.model) for rank in ranks]
    loaded = ranks[0]
    kv_shape = loaded.model.kv_shape
    block_size, longest = lengths(kv_shape, device, limits, loaded.max_position_embeddings)
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        reserve = int((1 - memory_fraction) * total_bytes)
        activations: int | None = _activations(loaded, limits)
        left = free_bytes - reserve - max(weights) - _activations(loaded, limits)
        kv_bytes = left - slot_bytes(limits, longest, block_size)
    else:
        free_bytes, activations = available_cpu_bytes(), None
        left = free_bytes - sum(weights) - num_ranks * CPU_PROCESS_BYTES
        kv_bytes = cpu_kv_budget(left, num_ranks)
    blocks = blocks_within(kv_bytes, kv_shape, block_size, device, limits, longest)
    workspace = slot_bytes(limits, blocks.max_total_tokens, block_size)
    if device.type == "cpu":
        reserve = max(0, left // num_ranks - blocks.num_bytes - workspace)
    problem = shortage(blocks, limits)
    if left <= 0:
        problem = f"{human(sum(weights))} of weights do not go into the {human(free_bytes)} that are free"
    return Estimate(
        MemoryPlan(device, max(weights), activations, workspace, reserve, blocks, limits),
        num_ranks,
        loaded.dtype,
        free_bytes,
        problem,
    )


def _activations(loaded: LoadedModel, limits: Limits) -> int:
    """A guess: a layer's widest tensors, and the logits of every sequence."""
    matrices = [tensor for tensor in tensors_in(loaded.model) if tensor.dim() == 2]
    layers = [tensor for tensor in matrices if tensor.shape[0] != loaded.vocab_size]
    widest = max((max(tensor.shape) for tensor in layers), default=0)
    wide = NUM_WIDE * limits.max_step_tokens * widest * loaded.dtype.itemsize
    logits = NUM_LOGITS * min(limits.max_sequences, limits.max_step_tokens) * loaded.vocab_size * 4
    return wide + logits
