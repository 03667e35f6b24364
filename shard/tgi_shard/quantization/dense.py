"""Unquantized weights. bfloat16 on a CPU with the instructions for it goes through oneDNN's packed format.

F.linear repacks a plain weight at every call; packed once, a multiplication by 1 to 32 rows takes 0.4 to 0.8
of its time.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tgi_shard.quantization.method import Part, Tensors


@dataclass(frozen=True, slots=True)
class Dense:
    """layout: how the checkpoint stores a weight. Multiplication always uses [out, in]."""

    layout: Literal["out_in", "in_out"] = "out_in"

    @property
    def parts(self) -> tuple[Part, ...]:
        if self.layout == "out_in":
            return (Part("weight", out_axis=0, in_axis=1),)
        return (Part("weight", out_axis=1, in_axis=0),)

    def shape(self, part: Part, in_features: int, out_features: int) -> tuple[int, ...]:
        return (out_features, in_features) if self.layout == "out_in" else (in_features, out_features)

    def prepare(self, tensors: Tensors) -> Tensors:
        weight = tensors["weight"] if self.layout == "out_in" else tensors["weight"].t().contiguous()
        if can_pack(weight):
            # A copy either way; on the meta device, which knows no formats, a plain one.
            packed = weight.clone() if weight.is_meta else torch.ops.mkldnn._reorder_linear_weight(weight)
            return {"packed": packed}
        return {"weight": weight}

    def matmul(self, x: Tensor, tensors: Tensors, bias: Tensor | None) -> Tensor:
        packed = tensors.get("packed")
        if packed is not None:
            num_rows = len(x)
            num_more = padded(num_rows) - num_rows
            x = F.pad(x, (0, 0, 0, num_more)) if num_more else x
            return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")[:num_rows]
        return F.linear(x, tensors["weight"], bias)


def padded(num_rows: int) -> int:
    """The nearest number of rows, up to an eighth more, for which oneDNN is asked to multiply.

    It compiles a program for each shape that it meets, and keeps up to a thousand of them: 0.6 ms, as long as
    50 to 100 rows of a small weight take, and 0.6 MB apiece. From one power of two to the next there are
    eight such numbers.
    """
    step = 1 << max(0, num_rows.bit_length() - 4)
    return -(-num_rows // step) * step


def can_pack(weight: Tensor) -> bool:
    """A weight on the meta device stands for one on the device that this machine has."""
    is_on_cpu = weight.device.type == "cpu" or (weight.is_meta and not torch.cuda.is_available())
    return (
        is_on_cpu
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
