"""The states of recurrent models: a block holds one sequence's, of every layer, at whatever token it stands.

A state cannot be taken back: a token that has been computed is in it for good. So what a block holds counts
from the moment a sequence begins on it (`begins`), and a sequence that starts over begins with nothing.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

DEFAULT_MAX_TOTAL_TOKENS = (
    8192  # where nobody sets a limit: a state has none, but token ids take room as well
)


@dataclass(frozen=True, slots=True)
class StateShape:
    """What one sequence costs on this rank, however long it is."""

    num_layers: int
    history: tuple[int, int]  # of a layer: the last inputs of its convolution, [inputs, channels]
    state: tuple[int, ...]  # of a layer: float32, rounding would add up from token to token
    dtype: torch.dtype  # of the history

    can_share_prefixes: ClassVar[bool] = False

    def block_size(self, device: torch.device, longest: int) -> int:
        return longest or DEFAULT_MAX_TOTAL_TOKENS

    def bytes_per_block(self, block_size: int) -> int:
        """The same for every block size."""
        num_bytes = math.prod(self.history) * self.dtype.itemsize + math.prod(self.state) * 4
        return self.num_layers * num_bytes

    def allocate(self, num_blocks: int, block_size: int, device: torch.device) -> "StateCache":
        layers = range(self.num_layers)
        return StateCache(
            tuple(torch.empty((num_blocks, *self.history), dtype=self.dtype, device=device) for _ in layers),
            tuple(torch.empty((num_blocks, *self.state), device=device) for _ in layers),
            num_blocks,
            block_size,
        )


@dataclass(frozen=True, slots=True)
class StateCache:
    """Not initialised: what a block holds is not read before its sequence has written it."""

    histories: tuple[Tensor, ...]  # a layer: [num_blocks, inputs, channels]
    states: tuple[Tensor, ...]  # a layer: [num_blocks, ...] float32
    num_blocks: int
    block_size: int

    def read(self, layer: int, blocks: Tensor, begins: Tensor | None) -> tuple[Tensor, Tensor]:
        """Copies of the history and state in `blocks`; zeros for rows that begin (None: no row does)."""
        history, state = (store[layer].index_select(0, blocks) for store in (self.histories, self.states))
        if begins is not None:
            for copy in (history, state):
                copy.masked_fill_(begins.view(-1, *[1] * (copy.dim() - 1)), 0)
        return history, state

    def write(self, layer: int, blocks: Tensor, history: Tensor, state: Tensor) -> None:
        self.histories[layer].index_copy_(0, blocks, history)
        self.states[layer].index_copy_(0, blocks, state)
