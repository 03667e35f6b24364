"""Attention in plain torch: runs anywhere, is what kernels are tested against, and is the fast path on CPUs.

Rows with one new token (decodes) go through one batched call: their blocks are gathered to [rows, tokens],
the query heads of a KV head stand as query positions, so K and V are never repeated, and a mask hides what
is not theirs. Rows of very different lengths are split into groups first, or the shortest would pay for the
longest.

Rows with more (prompt chunks) are attended one by one: without a prefix straight from the projections,
causally; with one from the gathered blocks, in tiles of queries under a mask.

A row reads its own blocks alone. Slots that a mask hides still enter a product with 0, and 0 x NaN is NaN: a
block that a row begins is cleared first, so that a broken sequence leaves nothing behind for the next owner.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tgi_shard.attention.backend import Heads
from tgi_shard.kv_cache import KVCache
from tgi_shard.step import StepInputs

_MAX_PADDING_TOKENS = 512  # of a group of decodes: about what one more call costs
_TILE = 256  # queries that share a mask


@dataclass(frozen=True, slots=True)
class ReferenceAttention:
    heads: Heads

    def plan(self, inputs: StepInputs, kv_cache: KVCache) -> "ReferencePlan":
        return ReferencePlan(self.heads, inputs, kv_cache, _begun_blocks(inputs, kv_cache.block_size))


def _begun_blocks(inputs: StepInputs, block_size: int) -> Tensor | None:
    """Ids of the blocks whose first slots this step writes and whose last ones it does not."""
    rows, columns = [], []
    for row, (num_new, context_len) in enumerate(
        zip(inputs.query_lens, inputs.context_lens_host, strict=True)
    ):
        num_in_last = context_len % block_size
        if 0 < num_in_last <= num_new:
            rows.append(row)
            columns.append(context_len // block_size)
    if not rows:
        return None
    device = inputs.block_tables.device
    return inputs.block_tables[torch.tensor(rows).to(device), torch.tensor(columns).to(device)]


@dataclass(frozen=True, slots=True)
class _Decodes:
    token_indices: Tensor | None  # [rows] among the step's tokens; None: all of them in order
    block_ids: Tensor  # [rows x num_blocks]
    mask: Tensor  # [rows, 1, 1, num_blocks x block_size]: 0 or -inf


@dataclass(frozen=True, slots=True)
class _Tile:
    """Some queries of a chunk and the keys they may see, both counted from the chunk's first."""

    start: int
    stop: int
    first_key: int
    last_key: int  # exclusive
    mask: Tensor  # [queries, keys]


@dataclass(frozen=True, slots=True)
class _Chunk:
    start: int  # among the step's tokens
    stop: int
    block_ids: Tensor | None  # the blocks it sees; None: it sees itself alone, all of it causally
    tiles: tuple[_Tile, ...]


@dataclass(frozen=True, slots=True)
class _Batch:
    decodes: tuple[_Decodes, ...]
    chunks: tuple[_Chunk, ...]


@dataclass(frozen=True, slots=True)
class ReferencePlan:
    heads: Heads
    inputs: StepInputs
    kv_cache: KVCache
    begun_blocks: Tensor | None
    _batches: dict[int | None, _Batch] = field(default_factory=dict)  # window -> what its layers share

    def attend(
        self, layer: int, query: Tensor, key_value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        store = self.kv_cache.stores[layer]
        if self.begun_blocks is not None:
            store.index_fill_(0, self.begun_blocks, 0)
        self.kv_cache.slots(layer).index_copy_(0, self.inputs.slot_ids, key_value)
        batch = self._batches.get(window)
        if batch is None:
            batch = self._batches[window] = _Planner(
                self.inputs, self.kv_cache.block_size, window, query
            ).batch()
        if len(batch.decodes) == 1 and batch.decodes[0].token_indices is None:
            return self._decode(batch.decodes[0], store, query, scale).reshape(len(query), -1)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for decodes in batch.decodes:
            assert decodes.token_indices is not None  # only a group that is the whole step has none
            attended = self._decode(decodes, store, query.index_select(0, decodes.token_indices), scale)
            out.index_copy_(0, decodes.token_indices, attended.reshape(-1, *query.shape[1:]))
        for chunk in batch.chunks:
            span = slice(chunk.start, chunk.stop)
            self._chunk(chunk, store, query[span], key_value[span], scale, out[span])
        return out.flatten(1)

    def _decode(self, decodes: _Decodes, store: Tensor, query: Tensor, scale: float) -> Tensor:
        """query: [rows, heads, head_dim] -> [rows, kv heads, heads of one, head_dim]."""
        num_rows = len(query)
        query = query.view(num_rows, self.heads.num_kv_heads, -1, self.heads.head_dim)
        gathered = store.index_select(0, decodes.block_ids).view(num_rows, -1, *store.shape[2:])
        key, value = gathered.transpose(1, 3).unbind(2)  # [rows, kv heads, tokens, head_dim]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=decodes.mask, scale=scale)

    def _chunk(
        self, chunk: _Chunk, store: Tensor, query: Tensor, key_value: Tensor, scale: float, out: Tensor
    ) -> None:
        """query and out: [queries, heads, head_dim]; key_value: the chunk's own."""
        query = self._by_kv_head(query)
        if chunk.block_ids is None:
            key, value = self._keys(key_value)
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
            self._by_kv_head(out).copy_(attended)
            return
        seen = store.index_select(0, chunk.block_ids).flatten(0, 1)
        for tile in chunk.tiles:
            key, value = self._keys(seen[tile.first_key : tile.last_key])
            queries = query[:, :, tile.start : tile.stop]
            attended = F.scaled_dot_product_attention(queries, key, value, attn_mask=tile.mask, scale=scale)
            self._by_kv_head(out[tile.start : tile.stop]).copy_(attended)

    def _by_kv_head(self, x: Tensor) -> Tensor:
        """[queries, heads, head_dim] -> [kv heads, heads of one, queries, head_dim], a view."""
        return x.view(len(x), self.heads.num_kv_heads, -1, self.heads.head_dim).permute(1, 2, 0, 3)

    def _keys(self, key_value: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, 2, kv heads, head_dim] -> K and V as [kv heads, heads of one, tokens, head_dim], views."""
        group = self.heads.num_heads // self.heads.num_kv_heads
        key, value = key_value.permute(1, 2, 0, 3).unsqueeze(2).expand(-1, -1, group, -1, -1)
        return key, value


@dataclass(frozen=True, slots=True)
class _Planner:
    """Turns a step's lengths into calls, on the host: nothing here waits for the device."""

    inputs: StepInputs
    block_size: int
    window: int | None
    like: Tensor  # masks have its dtype and device

    def batch(self) -> _Batch:
        query_lens = self.inputs.query_lens
        decodes = tuple(self._decode_groups([row for row, length in enumerate(query_lens) if length == 1]))
        return _Batch(decodes, tuple(self._chunks()))

    def _first_key(self, position: int) -> int:
        return 0 if self.window is None else max(0, position - self.window + 1)

    def _decode_groups(self, rows: list[int]) -> Iterator[_Decodes]:
        """Longest first; a group ends when padding it further would cost more than another call."""
        context_lens = self.inputs.context_lens_host
        first_blocks = {row: self._first_key(context_lens[row] - 1) // self.block_size for row in rows}
        num_blocks = {row: -(-context_lens[row] // self.block_size) - first_blocks[row] for row in rows}
        group: list[int] = []
        padding = 0
        for row in sorted(rows, key=lambda row: -num_blocks[row]):
            more = (num_blocks[group[0]] - num_blocks[row]) * self.block_size if group else 0
            if padding + more > _MAX_PADDING_TOKENS:
                yield self._decodes(group, first_blocks, num_blocks[group[0]])
                group, padding, more = [], 0, 0
            group.append(row)
            padding += more
        if group:
            yield self._decodes(sorted(group), first_blocks, max(num_blocks[row] for row in group))

    def _decodes(self, group: list[int], first_blocks: dict[int, int], num_blocks: int) -> _Decodes:
        context_lens = torch.tensor([self.inputs.context_lens_host[row] for row in group]).unsqueeze(1)
        first = torch.tensor([first_blocks[row] for row in group]).unsqueeze(1)
        last = (context_lens - 1) // self.block_size
        columns = torch.minimum(
            first + torch.arange(num_blocks), last
        )  # padding repeats the row's own last block
        positions = first * self.block_size + torch.arange(num_blocks * self.block_size)
        is_hidden = positions >= context_lens
        if self.window is not None:
            is_hidden |= positions < context_lens - self.window
        is_whole_step = len(group) == len(self.inputs.query_lens)
        rows = torch.tensor(group)
        return _Decodes(
            token_indices=None if is_whole_step else self._starts(group),
            block_ids=self.inputs.block_tables[self._here(rows).unsqueeze(1), self._here(columns)].flatten(),
            mask=self._mask(is_hidden)[:, None, None],
        )

    def _starts(self, rows: list[int]) -> Tensor:
        starts = [0]
        for length in self.inputs.query_lens:
            starts.append(starts[-1] + length)
        return self._here(torch.tensor([starts[row] for row in rows]))

    def _chunks(self) -> Iterator[_Chunk]:
        start = 0
        strip: Tensor | None = None
        offset = max(self.inputs.context_lens_host) if self.window is None else self.window - 1
        for row, length in enumerate(self.inputs.query_lens):
            if length > 1:
                context_len = self.inputs.context_lens_host[row]
                if context_len == length and (self.window is None or length <= self.window):
                    yield _Chunk(start, start + length, None, ())
                else:
                    if strip is None:
                        strip = self._strip(offset)
                    yield self._tiled(row, start, length, strip, offset)
            start += length

    def _tiled(self, row: int, start: int, length: int, strip: Tensor, offset: int) -> _Chunk:
        prefix = self.inputs.context_lens_host[row] - length
        first_block = self._first_key(prefix) // self.block_size
        num_blocks = -(-(prefix + length) // self.block_size)
        origin = first_block * self.block_size  # position of the first gathered key
        tiles = []
        for first in range(0, length, _TILE):
            stop = min(first + _TILE, length)
            first_key, last_key = self._first_key(prefix + first), prefix + stop
            column = offset - (prefix + first - first_key)
            mask = strip[: stop - first, column : column + last_key - first_key]
            if mask.device.type == "cuda":
                mask = mask.contiguous()  # its kernels want rows that begin at aligned addresses
            tiles.append(_Tile(first, stop, first_key - origin, last_key - origin, mask))
        block_ids = self.inputs.block_tables[row, first_block:num_blocks]
        return _Chunk(start, start + length, block_ids, tuple(tiles))

    def _strip(self, offset: int) -> Tensor:
        """[_TILE, offset + _TILE], in which column `offset` is the key of query 0 itself.

        Whether a query sees a key depends on their distance alone: every tile's mask is a piece of it.
        """
        ahead = torch.arange(offset + _TILE) - torch.arange(_TILE).unsqueeze(1) - offset  # key - query
        is_hidden = ahead > 0
        if self.window is not None:
            is_hidden |= ahead <= -self.window
        return self._mask(is_hidden)

    def _mask(self, is_hidden: Tensor) -> Tensor:
        mask = torch.zeros(is_hidden.shape, dtype=self.like.dtype).masked_fill_(is_hidden, float("-inf"))
        return self._here(mask)

    def _here(self, x: Tensor) -> Tensor:
        return x.to(self.like.device, non_blocking=True)
