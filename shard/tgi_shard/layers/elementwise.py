"""Functions of single numbers, applied so that equal numbers give equal bits wherever they stand.

On a CPU torch takes numbers by the vector and what is left over at the end of a tensor one by one, and each
thread does so with its own share. The two ways differ in the last bit of a sigmoid or an exponential. So
tensors are cut where nothing is ever left over: into parts of which every thread's share is whole vectors.
"""

import torch
from torch import Tensor

from tgi_shard.layers.activation import Activation

VECTORS = 128  # numbers: a multiple of what any CPU's kernels take at a time
SHARE = 32768  # numbers: from as many for each thread on, torch shares out evenly among all threads
ALONE = 16384  # numbers: so many are never shared out


def evenly(function: Activation) -> Activation:
    """`function` of the numbers of a tensor, which it may not mix; the result is fresh and contiguous."""

    def applied(x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return function(x)  # every number has a thread of its own
        flat = x.reshape(-1)
        out = torch.empty_like(flat)
        start = 0
        for size in _parts(len(flat), torch.get_num_threads()):
            out[start : start + size] = function(flat[start : start + size])
            start += size
        if start < len(flat):
            rest = flat.new_zeros(VECTORS)
            rest[: len(flat) - start] = flat[start:]
            out[start:] = function(rest)[: len(flat) - start]
        return out.view(x.shape)

    return applied


def _parts(num_numbers: int, num_threads: int) -> list[int]:
    """What all threads can share in whole vectors, then what one takes alone; less than a vector is left."""
    sizes = []
    if num_numbers >= SHARE * num_threads:
        sizes.append(num_numbers // (num_threads * VECTORS) * num_threads * VECTORS)
        num_numbers -= sizes[0]
    sizes += [ALONE] * (num_numbers // ALONE)
    rest = num_numbers % ALONE // VECTORS * VECTORS
    return [*sizes, rest] if rest else sizes
