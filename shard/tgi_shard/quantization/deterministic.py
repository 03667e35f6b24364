"""Unquantized weights, multiplied so that a row's result depends on that row alone (same_bits.py says how).

On a CPU they go through oneDNN's packed format in float32 too: its kernels agree at almost every size, MKL's
at fewer, and what is packed lies at an aligned address.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from tgi_shard import same_bits
from tgi_shard.quantization.dense import Dense, can_pack, linear, pack
from tgi_shard.quantization.method import Part, Tensors
from tgi_shard.same_bits import Sizes

_REFERENCE = 16
_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# Of a trial: what has more multiplications is not tried, for the start should not take minutes.
_MAX_MULTIPLICATIONS = 2**33


@dataclass(frozen=True, slots=True)
class DeterministicDense:
    """As Dense, which reads the tensors."""

    layout: Literal["out_in", "in_out"] = "out_in"

    @property
    def parts(self) -> tuple[Part, ...]:
        return Dense(self.layout).parts

    def shape(self, part: Part, in_features: int, out_features: int) -> tuple[int, ...]:
        return Dense(self.layout).shape(part, in_features, out_features)

    def prepare(self, tensors: Tensors) -> Tensors:
        return _aligned(Dense(self.layout).out_in(tensors))

    def matmul(self, x: Tensor, tensors: Tensors, bias: Tensor | None) -> Tensor:
        (weight,) = tensors.values()
        out_features, in_features = weight.shape
        sizes = _sizes(
            in_features, out_features, bias is not None, x.dtype, x.device, torch.get_num_threads()
        )
        return sizes.call(lambda rows: linear(rows, tensors, bias), x)


def _aligned(weight: Tensor) -> Tensors:
    if can_pack(weight, (torch.bfloat16, torch.float32)):
        return pack(weight)
    return {"weight": weight.clone()}  # a mapped file's tensors stand at any address


@cache
def _sizes(
    in_features: int,
    out_features: int,
    has_bias: bool,
    dtype: torch.dtype,
    device: torch.device,
    num_threads: int,
) -> Sizes:
    """num_threads: kernels are chosen by it too."""
    x, weight = same_bits.cancelling(same_bits.NUM_EXAMPLES, out_features, in_features, dtype, device)
    tensors = _aligned(weight)
    bias = weight[:, 0].contiguous() if has_bias else None
    return same_bits.agreeing(
        lambda examples: linear(x[examples.to(device)], tensors, bias),
        _REFERENCE,
        _affordable(in_features * out_features),
    )


def _affordable(multiplications_per_row: int) -> Sequence[int]:
    return [size for size in _SIZES if size * multiplications_per_row <= _MAX_MULTIPLICATIONS]
