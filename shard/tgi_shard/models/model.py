"""What the engine asks of a model, whatever its kind: a step, and what sequences leave behind in between."""

from typing import Any, Protocol

import torch
from torch import Tensor

from tgi_shard.step import StepInputs


class Memory(Protocol):
    """What sequences leave behind on this rank, in blocks 0 .. num_blocks - 1 that the router grants."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_size(self) -> int: ...


class MemoryShape(Protocol):
    """What a block costs, before there is one."""

    @property
    def can_share_prefixes(self) -> bool:
        """Whether a full block serves every sequence that begins with its tokens.

        If not, a block holds the whole state of one sequence, at whatever token it stands.
        """
        ...

    def block_size(self, device: torch.device, longest: int) -> int:
        """Tokens in a block. longest: those of the longest sequence to come; 0: nobody has set a limit."""
        ...

    def bytes_per_block(self, block_size: int) -> int: ...

    def allocate(self, num_blocks: int, block_size: int, device: torch.device) -> Memory: ...


class Model(Protocol):
    """What the engine runs."""

    @property
    def kv_shape(self) -> MemoryShape: ...

    def forward(self, inputs: StepInputs, kv_cache: Any) -> Tensor:
        """One step: [L, vocab_size] float32 logits, whole on every rank; the step's tokens are remembered.

        kv_cache: as allocated by `kv_shape`. Under torch.inference_mode(), which is the caller's duty.
        """
        ...
