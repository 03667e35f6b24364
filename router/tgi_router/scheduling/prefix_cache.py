"""Full KV blocks by content, so that sequences with the same beginning share them.

A block's key is a digest of all tokens from the start of the sequence to the block's end: equal keys mean
equal KV. The key chains over blocks (digest of the parent's key and the block's tokens), so a prefix is
looked up block by block.

Blocks that no sequence holds stay here, least recently used first, until the allocator needs them.
Sequences release their blocks last to first, so a block is always evicted before the blocks that lead to
it: what remains is reachable.
"""

from __future__ import annotations  # array[int] exists at run time only from Python 3.12 on

from array import array
from collections import OrderedDict
from hashlib import blake2b

ROOT_KEY = b""  # of the empty prefix


def block_key(parent_key: bytes, token_ids: array[int]) -> bytes:
    """Key of the block that holds `token_ids` after the prefix `parent_key`.

    128 bits: no two contents meet.
    """
    digest = blake2b(parent_key, digest_size=16)
    digest.update(token_ids.tobytes())
    return digest.digest()


class PrefixCache:
    """Which block holds which content, and which of those blocks nobody holds.

    Owned by the block allocator.
    """

    def __init__(self) -> None:
        self._block_of_key: dict[bytes, int] = {}
        self._key_of_block: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # held by no sequence, least recently used first

    def __len__(self) -> int:
        return len(self._block_of_key)

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._key_of_block

    @property
    def num_idle(self) -> int:
        """Blocks that could be evicted now."""
        return len(self._idle)

    def match(self, token_ids: array[int], block_size: int, max_blocks: int) -> list[int]:
        """Blocks that hold the longest cached prefix of `token_ids`, at most `max_blocks`."""
        block_ids: list[int] = []
        key = ROOT_KEY
        for start in range(0, max_blocks * block_size, block_size):
            key = block_key(key, token_ids[start : start + block_size])
            block_id = self._block_of_key.get(key)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def insert(self, key: bytes, block_id: int) -> None:
        """Publish a block that a sequence holds and that will never be written again.

        A content stays where it was first.
        """
        if key not in self._block_of_key and block_id not in self._key_of_block:
            self._block_of_key[key] = block_id
            self._key_of_block[block_id] = key

    def on_held(self, block_id: int) -> None:
        """A sequence holds the block again: it must not be evicted."""
        self._idle.pop(block_id, None)

    def on_idle(self, block_id: int) -> None:
        """The last sequence that held the block let go: it is the most recently used idle one."""
        self._idle[block_id] = None

    def evict(self) -> int:
        """Forget the least recently used idle block and return it."""
        block_id, _ = self._idle.popitem(last=False)
        self._unlink(self._key_of_block.pop(block_id), block_id)
        return block_id

    def distrust(self, token_ids: array[int], block_size: int) -> None:
        """No sequence finds the prefixes of `token_ids` any more.

        The blocks stay with who holds them, and idle until they are evicted.
        """
        for block_id in self.match(token_ids, block_size, len(token_ids) // block_size):
            self._unlink(self._key_of_block[block_id], block_id)

    def _unlink(self, key: bytes, block_id: int) -> None:
        if self._block_of_key.get(key) == block_id:  # else distrusted: the content may have a new block
            del self._block_of_key[key]
