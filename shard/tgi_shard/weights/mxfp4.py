"""MXFP4: 32 numbers of 4 bits each share a power of two (OCP Microscaling Formats 1.0, 2023)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tgi_shard.weights.packed import Ranges, Read, cut_of

GROUP_SIZE = 32
BLOCK_BYTES = GROUP_SIZE // 2
_SCALE_BIAS = 127
# E2M1 by its code: a sign, two bits of exponent, one of mantissa.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = (*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES))


@dataclass(frozen=True, slots=True)
class MXFP4:
    """A linear's weight [out, in] as two tensors, by their names."""

    blocks: str  # [out, in / 32, 16] uint8: two numbers a byte, the lower four bits first
    scales: str  # [out, in / 32] uint8: exponents plus 127

    @property
    def sources(self) -> tuple[str, ...]:
        return self.blocks, self.scales

    def read(self, read: Read, shape: tuple[int, ...], ranges: Ranges, device: torch.device) -> Tensor:
        """A cut may begin and end within groups: those are read whole."""
        rows, (start, stop) = cut_of(shape, ranges)
        first_group, num_groups = start // GROUP_SIZE, shape[1] // GROUP_SIZE
        cut = {0: rows, 1: (first_group, -(-stop // GROUP_SIZE))}
        blocks = read(self.blocks, (shape[0], num_groups, BLOCK_BYTES), cut)
        scales = read(self.scales, (shape[0], num_groups), cut)
        origin = first_group * GROUP_SIZE
        return dequantize(blocks.to(device), scales.to(device))[:, start - origin : stop - origin]


def dequantize(blocks: Tensor, scales: Tensor) -> Tensor:
    """[out, groups, 16] and [out, groups], both uint8 -> [out, 32 x groups] float32, exact."""
    codes = torch.stack((blocks & 0xF, blocks >> 4), dim=-1).flatten(-2)  # [out, groups, 32]
    numbers = torch.tensor(_VALUES, device=blocks.device)[codes.int()]
    return torch.ldexp(numbers, scales.int().unsqueeze(-1) - _SCALE_BIAS).flatten(-2)
