"""A tensor that a checkpoint stores in fewer bits, as several of its own: multiplied out as it is read."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Ranges = dict[int, tuple[int, int]]  # axis -> [start, stop)
Read = Callable[[str, tuple[int, ...], Ranges], Tensor]  # name, shape of the whole, cut


class Packed(Protocol):
    @property
    def sources(self) -> tuple[str, ...]:
        """The names of what the checkpoint holds."""
        ...

    def read(self, read: Read, shape: tuple[int, ...], ranges: Ranges, device: torch.device) -> Tensor:
        """A cut of the tensor, of which the whole has `shape`, in float32.

        Computed on `device`: faster where that is a GPU; on the meta device there is nothing to compute.
        """
        ...


def cut_of(shape: tuple[int, ...], ranges: Ranges) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of a matrix that are asked for."""
    num_rows, num_columns = shape
    return ranges.get(0, (0, num_rows)), ranges.get(1, (0, num_columns))
