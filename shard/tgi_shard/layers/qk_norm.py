"""Norms of queries and keys, after their projection and before their rotation."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tgi_shard.distributed import Group


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """Every query and key head by itself."""

    kind: str  # "rms" or "layer"
    weight: Tensor  # [query and key heads, head_dim]
    bias: Tensor | None  # [query and key heads, head_dim]
    eps: float

    def apply_(self, heads: Tensor) -> None:
        """In place on [num_tokens, query and key heads, head_dim]."""
        x = heads.to(self.weight.dtype)  # wider than the heads where the weight is
        size = heads.shape[-1:]
        if self.kind == "rms":
            normed = F.rms_norm(x, size, None, self.eps)
        else:
            normed = F.layer_norm(x, size, None, None, self.eps)
        torch.mul(normed, self.weight, out=heads)
        if self.bias is not None:
            heads.add_(self.bias)


@dataclass(frozen=True, slots=True)
class AllHeadsNorm:
    """An RMSNorm over the features of all query heads together, and one over those of all key heads."""

    weight: Tensor  # [local query and key heads, head_dim]
    num_heads: int  # local query heads: the first ones
    eps: float
    group: Group

    def apply_(self, heads: Tensor) -> None:
        """In place on [num_tokens, query and key heads, head_dim]."""
        x = heads.float()
        squares = x.square().sum(-1)
        split = (squares[:, : self.num_heads], squares[:, self.num_heads :])
        # Every rank counts as many features as the others, also where neighbours repeat a key head.
        sums = self.group.all_reduce(torch.stack([part.mean(-1) for part in split]))
        scales = torch.rsqrt(sums / (self.group.world_size * heads.shape[-1]) + self.eps)  # [2, num_tokens]
        for part, scale, weight in zip(
            (heads[:, : self.num_heads], heads[:, self.num_heads :]),
            scales,
            (self.weight[: self.num_heads], self.weight[self.num_heads :]),
            strict=True,
        ):
            part.copy_((part.float() * scale[:, None, None]).to(heads.dtype) * weight)


QKNorm = HeadNorm | AllHeadsNorm
