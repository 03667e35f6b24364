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
        weight = self.out_in(tensors)
        return pack(weight) if can_pack(weight) else {"weight": weight}

    def out_in(self, tensors: Tensors) -> Tensor:
        weight = tensors["weight"]
        return weight if self.layout == "out_in" else weight.t().contiguous()

    def matmul(self, x: Tensor, tensors: Tensors, bias: Tensor | None) -> Tensor:
        if "packed" in tensors:
            num_rows = len(x)
            num_more = padded(num_rows) - num_rows
            x = F.pad(x, (0, 0, 0, num_more)) if num_more else x
            return linear(x, tensors, bias)[:num_rows]
        return linear(x, tensors, bias)


def linear(x: Tensor, tensors: Tensors, bias: Tensor | None) -> Tensor:
    """x times a weight [out, in], packed or plain."""
    if "packed" in tensors:
        return torch.ops.mkldnn._linear_pointwise(x, tensors["packed"], bias, "none", [], "")
    return F.linear(x, tensors["weight"], bias)


def pack(weight: Tensor) -> Tensors:
    # A copy either way; on the meta device, which knows no formats, a plain one.
    return {"packed": weight.clone() if weight.is_meta else torch.ops.mkldnn._reorder_linear_weight(weight)}


def padded(num_rows: int) -> int:
    """The nearest number of rows, up to an eighth more, for which oneDNN is asked to multiply.

    It compiles a program for each shape that it meets, and keeps up to a thousand of them: 0.6 ms, as long as
    50 to 100 rows of a small weight take, and 0.6 MB apiece. From one power of two to the next there are
    eight such numbers.
    """
    step = 1 << max(0, num_rows.bit_length() - 4)
    return -(-num_rows // step) * step


def can_pack(weight: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)) -> bool:
    """A weight on the meta device stands for one on the device that this machine has."""
    is_on_cpu = weight.device.type == "cpu" or (weight.is_meta and not torch.cuda.is_available())
    return (
        is_on_cpu
        and weight.dtype in dtypes
        and torch.backends.mkldnn.is_available()
        and (weight.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
