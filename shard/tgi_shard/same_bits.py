"""Calls of which every row comes out the same, bit for bit, whatever stands beside it.

A library chooses its kernel, and with that the order of its sums, by the shape of a call. So a call is made
in pieces of a few fixed sizes, the last one padded. Which sizes give the same bits is not assumed but tried:
once for each shape, on this machine, with these libraries and as many threads, before the first result is
used. The order of a kernel's sums does not depend on the numbers, so numbers are tried that would show any
difference: their exact sum is zero, and what is left is nothing but rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tgi_shard.model_folder import ModelError

NUM_EXAMPLES = 7  # odd: so an example meets every place of a kernel's tile
ALIGNMENT = 64  # bytes: where torch puts fresh tensors
LANES = 16  # kernels take so many columns at a time; columns left over depend on the row's place, in some


class NotReproducible(ModelError):
    """This machine has no way to make the calls that were asked for reproducible."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [start, stop) of a call, computed as `size` rows."""

    start: int
    stop: int
    size: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of rows that agree; ascending."""

    sizes: tuple[int, ...]

    def pieces(self, num_rows: int) -> Iterator[Piece]:
        """As many of the largest size as there are; the rest in one piece, padded up to the next size.

        No rows are a piece too.
        """
        largest = self.sizes[-1]
        for start in range(0, max(num_rows, 1), largest):
            stop = min(start + largest, num_rows)
            yield Piece(start, stop, next(size for size in self.sizes if size >= stop - start))

    def call(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """function(*inputs), whose results and inputs are all [num_rows, ..], in pieces; fresh."""
        num_rows = len(inputs[0])
        parts = [
            function(*(_rows(x, piece) for x in inputs))[: piece.stop - piece.start]
            for piece in self.pieces(num_rows)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def agreeing(run: Callable[[Tensor], Tensor], reference: int, candidates: Sequence[int]) -> Sizes:
    """`reference`, and those of the candidates at which a row has the bits that it has there.

    run: examples to results [size, ..], from their numbers [size] int64 below NUM_EXAMPLES.
    Raises NotReproducible if even at `reference` a row's result depends on its place.
    """

    def results(size: int) -> tuple[Tensor, Tensor]:
        examples = torch.arange(size) % NUM_EXAMPLES
        return examples, run(examples)

    _, found = results(reference)
    expected = found[:NUM_EXAMPLES]

    def agrees(size: int) -> bool:
        examples, found = results(size)
        return torch.equal(found, expected[examples.to(found.device)])

    if reference < NUM_EXAMPLES or not agrees(reference):
        raise NotReproducible(
            "`--deterministic` cannot be kept on this machine with these libraries: "
            f"a row's result depends on its place among {reference}"
        )
    return Sizes(tuple(sorted({reference, *(size for size in candidates if agrees(size))})))


def cancelling(
    num_rows: int, num_columns: int, length: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """x [num_rows, length] and weight [num_columns, length]: were sums exact, all products would be zero."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(length, generator=generator)

    def halves(count: int, sign: float) -> Tensor:
        half = torch.randn(count, length // 2, generator=generator)
        rest = torch.zeros(count, length % 2)
        return torch.cat((half, sign * half, rest), 1)[:, order].to(device, dtype)

    # As many columns as differ: the others repeat them.
    weight = halves(min(num_columns, 64), -1.0)
    return halves(num_rows, 1.0), weight[torch.arange(num_columns, device=device) % len(weight)]


def padded(num_columns: int) -> int:
    """So many that none are left over."""
    return -(-num_columns // LANES) * LANES


def _rows(x: Tensor, piece: Piece) -> Tensor:
    """Contiguous, at an aligned address, padded with zeros."""
    part = x[piece.start : piece.stop]
    if len(part) < piece.size:
        padded = part.new_zeros((piece.size, *part.shape[1:]))
        padded[: len(part)] = part
        return padded
    part = part.contiguous()
    return part if part.data_ptr() % ALIGNMENT == 0 else part.clone()
