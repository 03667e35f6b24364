"""Norms over the last dimension, computed in float32 whatever the dtype."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """x / rms(x) * weight. Zhang and Sennrich 2019, arXiv:1910.07467."""

    weight: Tensor  # [size]
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class WideRMSNorm:
    """The same with a float32 weight, which the product meets before it is rounded to x's dtype."""

    weight: Tensor  # [size] float32
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """(x - mean(x)) / std(x) * weight + bias. Ba et al. 2016, arXiv:1607.06450."""

    size: int
    weight: Tensor | None  # [size]
    bias: Tensor | None  # [size]
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.size,), self.weight, self.bias, self.eps)


AnyNorm = RMSNorm | WideRMSNorm | LayerNorm
