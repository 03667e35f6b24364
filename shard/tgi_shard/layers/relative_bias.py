"""What a score gains or loses by the distance between query and key (Raffel et al. 2019, arXiv:1910.10683).

Near distances have a learned number each, far ones share one by the logarithm of the distance, and all
beyond the last bucket share the last one.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tgi_shard.weights.loading import Weights


@dataclass(frozen=True, slots=True)
class RelativeBias:
    by_distance: Tensor  # [heads, distances]; a column for every distance up to where they all share one
    first: int  # the distance of column 0, see `__call__`

    @classmethod
    def load(
        cls,
        weights: Weights,
        module: str,
        *,
        num_buckets: int,
        max_distance: int,
        num_heads: int,
        heads: tuple[int, int],
        sees_ahead: bool,
    ) -> "RelativeBias":
        """heads: this rank's. sees_ahead: keys behind the query have buckets of their own."""
        table = weights.read(f"{module}.weight", (num_buckets, num_heads), {1: heads})
        distances = torch.arange(-max_distance, max_distance + 1 if sees_ahead else 1)
        columns = _buckets(distances, num_buckets, max_distance, sees_ahead)
        return cls(table[columns.to(table.device)].t().contiguous(), -max_distance)

    def __call__(self, ahead: Tensor) -> Tensor:
        """ahead: key's position minus query's, int64 of any shape -> [heads, *that shape]."""
        last = self.first + self.by_distance.shape[1] - 1
        return self.by_distance[:, ahead.clamp(self.first, last) - self.first]


def _buckets(ahead: Tensor, num_buckets: int, max_distance: int, sees_ahead: bool) -> Tensor:
    first = torch.zeros_like(ahead)
    if sees_ahead:
        num_buckets //= 2
        first = (ahead > 0) * num_buckets
    distance = ahead.abs()
    num_exact = num_buckets // 2
    share = torch.log(distance.clamp(min=1).float() / num_exact) / math.log(max_distance / num_exact)
    far = num_exact + (share * (num_buckets - num_exact)).long()
    return first + torch.where(distance < num_exact, distance, far.clamp(max=num_buckets - 1))
