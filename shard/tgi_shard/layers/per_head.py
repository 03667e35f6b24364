"""A linear layer in which every head has a weight of its own."""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tgi_shard import same_bits
from tgi_shard.same_bits import Sizes

_REFERENCE = 16
_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


@dataclass(frozen=True, slots=True)
class PerHead:
    weight: Tensor  # [heads, in, out]

    def __call__(self, x: Tensor) -> Tensor:
        """[num_tokens, heads, in] -> [num_tokens, heads, out]"""
        return _multiplied(x, self.weight)


@dataclass(frozen=True, slots=True)
class DeterministicPerHead:
    """A token's result depends on that token alone."""

    weight: Tensor  # padded, see LANES
    num_out: int

    @classmethod
    def of(cls, weight: Tensor) -> "DeterministicPerHead":
        num_out = weight.shape[-1]
        return cls(F.pad(weight, (0, same_bits.padded(num_out) - num_out)), num_out)

    def __call__(self, x: Tensor) -> Tensor:
        sizes = _sizes(tuple(self.weight.shape), x.dtype, x.device, torch.get_num_threads())
        return sizes.call(lambda rows: _multiplied(rows, self.weight), x)[..., : self.num_out]


AnyPerHead = PerHead | DeterministicPerHead


def _multiplied(x: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)


@cache
def _sizes(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, num_threads: int) -> Sizes:
    """num_threads: kernels are chosen by it too."""
    num_heads, num_in, num_out = shape
    x, weight = same_bits.cancelling(same_bits.NUM_EXAMPLES, num_out, num_in, dtype, device)
    x, weight = x.unsqueeze(1).expand(-1, num_heads, -1), weight.t().expand(shape).contiguous()
    return same_bits.agreeing(
        lambda examples: _multiplied(x[examples.to(device)], weight), _REFERENCE, _SIZES
    )
