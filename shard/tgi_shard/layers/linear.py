"""Linear layers over a group of ranks, loaded from one or several modules of the checkpoint.

Column-parallel: a rank holds some output features; its input is whole and its output is its own part.
Row-parallel: a rank holds some input features; its input is its own part; a sum makes its output whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tgi_shard.distributed import SINGLE, Group
from tgi_shard.quantization.method import LinearMethod, Part, Tensors
from tgi_shard.weights.loading import Weights


@dataclass(frozen=True, slots=True)
class Piece:
    """Output features [start, stop) of a module of the checkpoint, which has `out_features` in all."""

    module: str
    start: int
    stop: int
    out_features: int


@dataclass(frozen=True, slots=True)
class Linear:
    method: LinearMethod
    tensors: Tensors
    bias: Tensor | None
    group: Group  # the ranks whose outputs are summed; SINGLE: none

    def __call__(self, x: Tensor) -> Tensor:
        """[num_tokens, in] -> [num_tokens, out], a fresh tensor."""
        return self.group.all_reduce(self.method.matmul(x, self.tensors, self.bias))


def column_parallel(
    weights: Weights, method: LinearMethod, pieces: Sequence[Piece], in_features: int, has_bias: bool
) -> Linear:
    """The pieces one after the other as one linear: a fused projection costs one multiplication."""
    tensors = {part.name: _read_pieces(weights, method, part, pieces, in_features) for part in method.parts}
    bias = None
    if has_bias:
        biases = [
            weights.read(f"{piece.module}.bias", (piece.out_features,), {0: (piece.start, piece.stop)})
            for piece in pieces
        ]
        bias = torch.cat(biases)
    return Linear(method, method.prepare(tensors), bias, SINGLE)


def row_parallel(
    weights: Weights,
    method: LinearMethod,
    module: str,
    in_features: int,
    out_features: int,
    has_bias: bool,
    group: Group,
    *,
    is_summed: bool = True,
) -> Linear:
    """The group's size must divide `in_features`. Not summed: the caller adds up the ranks' outputs."""
    assert in_features % group.world_size == 0
    local = in_features // group.world_size
    start = group.rank * local
    tensors: Tensors = {}
    for part in method.parts:
        shape = method.shape(part, in_features, out_features)
        ranges = {}
        if part.in_axis is not None:
            ranges[part.in_axis] = _scaled(start, start + local, shape[part.in_axis], in_features)
        tensors[part.name] = weights.read(f"{module}.{part.name}", shape, ranges)
    bias = None
    if has_bias:  # the outputs are summed, so one rank alone adds it
        bias_name = f"{module}.bias"
        if group.rank == 0:
            bias = weights.read(bias_name, (out_features,))
        else:
            weights.leave_to_another_rank(bias_name)
    return Linear(method, method.prepare(tensors), bias, group if is_summed else SINGLE)


def replicated(
    weights: Weights, method: LinearMethod, module: str, in_features: int, out_features: int, has_bias: bool
) -> Linear:
    """A small linear that every rank holds whole."""
    piece = Piece(module, 0, out_features, out_features)
    return column_parallel(weights, method, [piece], in_features, has_bias)


def _read_pieces(
    weights: Weights, method: LinearMethod, part: Part, pieces: Sequence[Piece], in_features: int
) -> Tensor:
    """One part of a fused linear. One without output features (an order of inputs) is common to all."""
    names = [f"{piece.module}.{part.name}" for piece in pieces]
    shapes = [method.shape(part, in_features, piece.out_features) for piece in pieces]
    axis = part.out_axis
    if axis is None:
        return weights.read(names[0], shapes[0])
    ranges = [
        _scaled(piece.start, piece.stop, shape[axis], piece.out_features)
        for piece, shape in zip(pieces, shapes, strict=True)
    ]
    sizes = [stop - start for start, stop in ranges]
    whole = torch.empty(
        [*shapes[0][:axis], sum(sizes), *shapes[0][axis + 1 :]],
        dtype=weights.local_dtype(names[0]),
        device=weights.device,
    )
    targets = whole.split(sizes, dim=axis)
    for name, shape, cut, target in zip(names, shapes, ranges, targets, strict=True):
        weights.read_into(target, name, shape, {axis: cut})
    return whole


def _scaled(start: int, stop: int, axis_size: int, num_features: int) -> tuple[int, int]:
    """Features [start, stop) on an axis where an element may hold several features, or a feature several."""
    return start * axis_size // num_features, stop * axis_size // num_features
