"""The KV tensors: one store a layer, cut into blocks that the router grants."""

import math
import mmap
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token costs on this rank."""

    can_share_prefixes: ClassVar[bool] = True

    num_layers: int
    local_num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    has_values: bool = True  # False: a token's value is its key, stored once (latent attention)

    @property
    def num_parts(self) -> int:
        """Of a token in a layer: K and V, or what is both."""
        return 2 if self.has_values else 1

    def bytes_per_block(self, block_size: int) -> int:
        """Bytes of a block of `block_size` tokens: K and V of every layer."""
        num_elements = self.num_parts * self.local_num_kv_heads * self.head_dim
        return self.num_layers * num_elements * block_size * self.dtype.itemsize

    def block_size(self, device: torch.device, longest: int) -> int:
        """Tokens in a block, of whatever length the sequences will be."""
        return 64 if device.type == "cuda" else 32

    def allocate(self, num_blocks: int, block_size: int, device: torch.device) -> "KVCache":
        return KVCache.allocate(self, num_blocks, block_size, device)


@dataclass(frozen=True, slots=True)
class KVCache:
    """Blocks 0 .. num_blocks - 1, all of them grantable. A slot is block id x block_size + offset."""

    # A layer: [num_blocks, block_size, 2, kv heads, head_dim]. A token's K and V lie side by side, as the QKV
    # projection leaves them, so that one copy writes both and one gather reads both. 1 in place of 2: K is V.
    stores: tuple[Tensor, ...]
    num_blocks: int
    block_size: int

    @classmethod
    def allocate(cls, shape: KVShape, num_blocks: int, block_size: int, device: torch.device) -> "KVCache":
        """Zeroed: a slot that nobody has written is masked, but 0 x NaN would still be NaN."""
        size = (num_blocks, block_size, shape.num_parts, shape.local_num_kv_heads, shape.head_dim)
        stores = tuple(_zeros(size, shape.dtype, device) for _ in range(shape.num_layers))
        return cls(stores, num_blocks, block_size)

    @property
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """(key, value) of each layer, as views [num_blocks, block_size, kv heads, head_dim]."""
        return [(store[:, :, 0], store[:, :, -1]) for store in self.stores]

    def slots(self, layer: int) -> Tensor:
        """A layer's store as a view with one row a slot: [num_blocks x block_size, 2, kv heads, head_dim]."""
        return self.stores[layer].flatten(0, 1)


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU the system clears each page when it is first written: gigabytes at once would take seconds."""
    num_bytes = math.prod(size) * dtype.itemsize
    if device.type != "cpu" or num_bytes == 0:
        return torch.zeros(size, dtype=dtype, device=device)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(size)
