"""FP8 with a scale for each block of a weight, as DeepSeek V3 is published (arXiv:2412.19437, section 3.3.2).

Beside each such `weight` lies a `weight_scale_inv`, which in spite of its name is what one multiplies by.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tgi_shard.weights.packed import Ranges, Read, cut_of

_SUFFIX = "_scale_inv"


@dataclass(frozen=True, slots=True)
class BlockFP8:
    """A linear's weight [out, in] as two tensors, by their names."""

    weight: str  # [out, in] float8
    scales: str  # [out / block rows, in / block columns], both rounded up: the last blocks may be cut off
    block: tuple[int, int]

    @property
    def sources(self) -> tuple[str, ...]:
        return self.weight, self.scales

    def read(self, read: Read, shape: tuple[int, ...], ranges: Ranges, device: torch.device) -> Tensor:
        cuts = cut_of(shape, ranges)
        # The blocks that hold the first and the last of a cut, and all between.
        of_scales = [
            (start // size, -(-stop // size)) for (start, stop), size in zip(cuts, self.block, strict=True)
        ]
        grid = tuple(-(-size // of_block) for size, of_block in zip(shape, self.block, strict=True))
        numbers = read(self.weight, shape, dict(enumerate(cuts))).to(device)
        scales = read(self.scales, grid, dict(enumerate(of_scales))).to(device)
        for axis, (start, stop) in enumerate(cuts):
            blocks = torch.arange(start, stop, device=device) // self.block[axis]
            scales = scales.index_select(axis, blocks - of_scales[axis][0])
        return numbers.float().mul_(scales)


def find(names: Iterable[str], block: tuple[int, int]) -> dict[str, BlockFP8]:
    """Those of a checkpoint's tensors that are stored so."""
    scales = [name for name in names if name.endswith(_SUFFIX)]
    weights = (name.removesuffix(_SUFFIX) for name in scales)
    return {weight: BlockFP8(weight, of, block) for weight, of in zip(weights, scales, strict=True)}
