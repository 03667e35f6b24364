"""KV blocks: take, share, free. Ids only; the tensors are the shards'.

Every block is in exactly one state: free, held (by one sequence or, if cached, by several), or idle
(cached, held by none).
"""

from __future__ import annotations  # array[int] exists at run time only from Python 3.12 on

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tgi_router.scheduling.prefix_cache import PrefixCache


def ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


@dataclass(frozen=True, slots=True)
class Allocation:
    block_ids: tuple[int, ...]  # in sequence order
    num_cached_tokens: int  # leading tokens whose KV those blocks already hold; a multiple of block_size


class BlockAllocator:
    def __init__(self, num_blocks: int, block_size: int, *, share_prefixes: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.share_prefixes = share_prefixes
        self.prefix_cache = PrefixCache()
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the lowest ids first
        self._num_holders = [0] * num_blocks

    @property
    def num_available(self) -> int:
        """Blocks that could be granted now: free ones, and idle ones of the prefix cache."""
        return len(self._free) + self.prefix_cache.num_idle

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_available

    def allocate(
        self, token_ids: array[int], *, use_cache: bool = True, reserve: int = 0
    ) -> Allocation | None:
        """Blocks for all tokens of a sequence so far.

        None, with nothing changed, if fewer than `reserve` would be left.
        """
        # The last token is always computed: its logits choose the next one.
        max_shared = (len(token_ids) - 1) // self.block_size if use_cache and self.share_prefixes else 0
        shared = self.prefix_cache.match(token_ids, self.block_size, max_shared)
        self._hold(shared)  # before taking others, which may evict what was just matched
        num_fresh = ceil_div(len(token_ids), self.block_size) - len(shared)
        fresh = self.take(num_fresh) if self.num_available >= num_fresh + reserve else None
        if fresh is None:
            self.release(shared)
            return None
        return Allocation((*shared, *fresh), len(shared) * self.block_size)

    def take(self, num_blocks: int) -> tuple[int, ...] | None:
        """That many blocks with nothing in them. None, with nothing changed, if too few are available."""
        if self.num_available < num_blocks:
            return None
        block_ids = tuple(
            self._free.pop() if self._free else self.prefix_cache.evict() for _ in range(num_blocks)
        )
        for block_id in block_ids:
            assert self._num_holders[block_id] == 0
            self._num_holders[block_id] = 1
        return block_ids

    def publish(self, key: bytes, block_id: int) -> None:
        """Share a held block whose every token is confirmed and computed."""
        assert self._num_holders[block_id] > 0
        if self.share_prefixes:
            self.prefix_cache.insert(key, block_id)

    def release(self, block_ids: Sequence[int]) -> None:
        """One holder less for each block; last block first, so that prefixes outlive what follows them."""
        for block_id in reversed(block_ids):
            assert self._num_holders[block_id] > 0, f"block {block_id} is released twice"
            self._num_holders[block_id] -= 1
            if self._num_holders[block_id] > 0:
                continue
            if block_id in self.prefix_cache:
                self.prefix_cache.on_idle(block_id)
            else:
                self._free.append(block_id)

    def _hold(self, block_ids: Iterable[int]) -> None:
        for block_id in block_ids:
            if self._num_holders[block_id] == 0:
                self.prefix_cache.on_held(block_id)
            self._num_holders[block_id] += 1

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Assert that the books balance, given the block tables of all living sequences.

        For tests and simulators.
        """
        num_holders = [0] * self.num_blocks
        for block_ids in held:
            assert len(set(block_ids)) == len(block_ids), "a sequence holds a block twice"
            for block_id in block_ids:
                num_holders[block_id] += 1
        assert num_holders == self._num_holders
        for block_id, holders in enumerate(num_holders):
            assert holders <= 1 or block_id in self.prefix_cache, f"block {block_id} has {holders} writers"
        free, idle = set(self._free), set(self.prefix_cache._idle)
        assert len(free) == len(self._free)
        unheld = {block_id for block_id in range(self.num_blocks) if num_holders[block_id] == 0}
        assert free | idle == unheld
        assert not free & idle
