"""Attention in plain torch: runs anywhere, is what kernels are tested against, and is the fast path on CPUs.

Rows with one new token (decodes) go through one batched call: their blocks are gathered to [rows, tokens],
the query heads of a KV head stand as query positions, so K and V are never repeated, and a mask hides what
is not theirs. Rows of very different lengths are split into groups first, or the shortest would pay for the
longest.

Rows with more (prompt chunks) are attended one by one: without a prefix straight from the projections,
causally; with one from the gathered blocks, in tiles of queries under a mask.

Soft-caps, distances (ALiBi) and sinks, which torch's fused call does not know, take the same batch through
two multiplications and a softmax written out, `_Scoring`.

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
        return ReferencePlan(self.heads, inputs, kv_cache, begun_blocks(inputs, kv_cache.block_size))


def begun_blocks(inputs: StepInputs, block_size: int) -> Tensor | None:
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
    ahead: Tensor | None  # the same shape, float32: key's position minus query's; None: not asked for


@dataclass(frozen=True, slots=True)
class _Tile:
    """Some queries of a chunk and the keys they may see, both counted from the chunk's first."""

    start: int
    stop: int
    first_key: int
    last_key: int  # exclusive
    mask: Tensor  # [queries, keys]
    ahead: Tensor | None  # the same shape, float32: key's position minus query's; None: not asked for


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
class _Scoring:
    """From queries, keys and values to outputs, by what fused kernels do not compute; scores in float32."""

    scale: float
    softcap: float | None
    slopes: Tensor | None  # [kv heads, heads of one, 1, 1]
    sinks: Tensor | None  # [kv heads, heads of one, 1, 1]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, ahead: Tensor) -> Tensor:
        """query: [.., kv heads, heads of one, queries, head_dim]. key, value: with 1 or as many heads.

        mask and ahead broadcast to the scores, [.., kv heads, heads of one, queries, keys].
        """
        scores = torch.matmul(query, key.transpose(-1, -2)).float() * self.scale
        if self.softcap is not None:
            scores = (scores / self.softcap).tanh_().mul_(self.softcap)
        if self.slopes is not None:
            scores = scores + self.slopes * ahead
        scores = scores + mask
        if self.sinks is not None:
            sinks = self.sinks.expand(*scores.shape[:-1], 1)
            weights = torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        return torch.matmul(weights.to(value.dtype), value)


@dataclass(frozen=True, slots=True)
class ReferencePlan:
    heads: Heads
    inputs: StepInputs
    kv_cache: KVCache
    begun_blocks: Tensor | None
    # (window, stretch, whether scores are written out) -> what the layers with those share
    _batches: dict[tuple[int | None, int | None, bool], _Batch] = field(default_factory=dict)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key_value: Tensor,
        *,
        scale: float,
        window: int | None,
        stretch: int | None = None,
        softcap: float | None = None,
        slopes: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        scoring = None
        if softcap is not None or slopes is not None or sinks is not None:
            scoring = _Scoring(scale, softcap, self._per_head(slopes), self._per_head(sinks))
        store = self.kv_cache.stores[layer]
        if self.begun_blocks is not None:
            store.index_fill_(0, self.begun_blocks, 0)
        self.kv_cache.slots(layer).index_copy_(0, self.inputs.slot_ids, key_value)
        key = (window, stretch, scoring is not None)
        batch = self._batches.get(key)
        if batch is None:
            batch = self._batches[key] = _Planner(
                self.inputs, self.kv_cache.block_size, window, stretch, scoring is not None, query
            ).batch()
        if len(batch.decodes) == 1 and batch.decodes[0].token_indices is None:
            return self._decode(batch.decodes[0], store, query, scale, scoring).reshape(len(query), -1)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for decodes in batch.decodes:
            assert decodes.token_indices is not None  # only a group that is the whole step has none
            chosen = query.index_select(0, decodes.token_indices)
            attended = self._decode(decodes, store, chosen, scale, scoring)
            out.index_copy_(0, decodes.token_indices, attended.reshape(-1, *query.shape[1:]))
        for chunk in batch.chunks:
            span = slice(chunk.start, chunk.stop)
            self._chunk(chunk, store, query[span], key_value[span], scale, scoring, out[span])
        return out.flatten(1)

    def _per_head(self, numbers: Tensor | None) -> Tensor | None:
        return None if numbers is None else numbers.view(self.heads.num_kv_heads, -1, 1, 1)

    def _decode(
        self, decodes: _Decodes, store: Tensor, query: Tensor, scale: float, scoring: _Scoring | None
    ) -> Tensor:
        """query: [rows, heads, head_dim] -> [rows, kv heads, heads of one, head_dim]."""
        num_rows = len(query)
        query = query.view(num_rows, self.heads.num_kv_heads, -1, self.heads.head_dim)
        gathered = store.index_select(0, decodes.block_ids).view(num_rows, -1, *store.shape[2:])
        parts = gathered.transpose(1, 3).unbind(2)  # [rows, kv heads, tokens, head_dim] each
        key, value = parts[0], parts[-1]  # one and the same if there are no values
        if scoring is not None:
            assert decodes.ahead is not None
            mask, ahead = decodes.mask.unsqueeze(3), decodes.ahead.unsqueeze(3)
            attended = scoring.attend(query.unsqueeze(3), key.unsqueeze(2), value.unsqueeze(2), mask, ahead)
            return attended.squeeze(3)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=decodes.mask, scale=scale)

    def _chunk(
        self,
        chunk: _Chunk,
        store: Tensor,
        query: Tensor,
        key_value: Tensor,
        scale: float,
        scoring: _Scoring | None,
        out: Tensor,
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
            if scoring is not None:
                assert tile.ahead is not None
                attended = scoring.attend(queries, key, value, tile.mask, tile.ahead)
            else:
                attended = F.scaled_dot_product_attention(
                    queries, key, value, attn_mask=tile.mask, scale=scale
                )
            self._by_kv_head(out[tile.start : tile.stop]).copy_(attended)

    def _by_kv_head(self, x: Tensor) -> Tensor:
        """[queries, heads, head_dim] -> [kv heads, heads of one, queries, head_dim], a view."""
        return x.view(len(x), self.heads.num_kv_heads, -1, self.heads.head_dim).permute(1, 2, 0, 3)

    def _keys(self, key_value: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, 2 or 1, kv heads, head_dim] -> K and V as [kv heads, heads of one, tokens, head_dim],
        views.
        """
        group = self.heads.num_heads // self.heads.num_kv_heads
        parts = key_value.permute(1, 2, 0, 3).unsqueeze(2).expand(-1, -1, group, -1, -1)
        return parts[0], parts[-1]


@dataclass(frozen=True, slots=True)
class _Strip:
    """Whether a query sees a key depends on their distance alone: a tile's mask is a piece of one strip."""

    offset: int  # the column of the key of query 0 itself
    mask: Tensor  # [_TILE, offset + _TILE]
    ahead: Tensor | None  # the same shape, see _Tile


@dataclass(frozen=True, slots=True)
class _Planner:
    """Turns a step's lengths into calls, on the host: nothing here waits for the device."""

    inputs: StepInputs
    block_size: int
    window: int | None
    stretch: int | None
    is_scored: bool  # by _Scoring, which needs distances, and a mask also where a chunk is plainly causal
    like: Tensor  # masks have its dtype and device

    def batch(self) -> _Batch:
        query_lens = self.inputs.query_lens
        decodes = tuple(self._decode_groups([row for row, length in enumerate(query_lens) if length == 1]))
        return _Batch(decodes, tuple(self._chunks()))

    def _first_key(self, position: int) -> int:
        if self.stretch is not None:
            return position // self.stretch * self.stretch
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
        if self.stretch is not None:
            is_hidden |= positions < (context_lens - 1) // self.stretch * self.stretch
        is_whole_step = len(group) == len(self.inputs.query_lens)
        rows = torch.tensor(group)
        return _Decodes(
            token_indices=None if is_whole_step else self._starts(group),
            block_ids=self.inputs.block_tables[self._here(rows).unsqueeze(1), self._here(columns)].flatten(),
            mask=self._mask(is_hidden)[:, None, None],
            ahead=self._here((positions - context_lens + 1).float())[:, None, None]
            if self.is_scored
            else None,
        )

    def _starts(self, rows: list[int]) -> Tensor:
        starts = [0]
        for length in self.inputs.query_lens:
            starts.append(starts[-1] + length)
        return self._here(torch.tensor([starts[row] for row in rows]))

    def _chunks(self) -> Iterator[_Chunk]:
        start = 0
        strip: _Strip | None = None
        offset = max(self.inputs.context_lens_host) if self.window is None else self.window - 1
        if self.stretch is not None:
            offset = min(offset, self.stretch - 1)
        # A prompt's first tokens, up to so many, see all of themselves.
        longest_causal = self.window or self.stretch
        for row, length in enumerate(self.inputs.query_lens):
            if length > 1:
                context_len = self.inputs.context_lens_host[row]
                is_causal = context_len == length and (longest_causal is None or length <= longest_causal)
                if is_causal and not self.is_scored:
                    yield _Chunk(start, start + length, None, ())
                else:
                    if strip is None:
                        strip = self._strip(offset)
                    yield self._tiled(row, start, length, strip)
            start += length

    def _tiled(self, row: int, start: int, length: int, strip: _Strip) -> _Chunk:
        prefix = self.inputs.context_lens_host[row] - length
        first_block = self._first_key(prefix) // self.block_size
        num_blocks = -(-(prefix + length) // self.block_size)
        origin = first_block * self.block_size  # position of the first gathered key
        tiles = []
        stop = 0
        while stop < length:
            first, stop = stop, min(stop + _TILE, length)
            if self.stretch is not None:  # its queries all see from one key on
                stop = min(stop, self._first_key(prefix + first) + self.stretch - prefix)
            first_key, last_key = self._first_key(prefix + first), prefix + stop
            column = strip.offset - (prefix + first - first_key)
            cut = (slice(0, stop - first), slice(column, column + last_key - first_key))
            mask = strip.mask[cut]
            if mask.device.type == "cuda":
                mask = mask.contiguous()  # its kernels want rows that begin at aligned addresses
            ahead = None if strip.ahead is None else strip.ahead[cut]
            tiles.append(_Tile(first, stop, first_key - origin, last_key - origin, mask, ahead))
        block_ids = self.inputs.block_tables[row, first_block:num_blocks]
        return _Chunk(start, start + length, block_ids, tuple(tiles))

    def _strip(self, offset: int) -> _Strip:
        ahead = torch.arange(offset + _TILE) - torch.arange(_TILE).unsqueeze(1) - offset  # key - query
        is_hidden = ahead > 0
        if self.window is not None:
            is_hidden |= ahead <= -self.window
        return _Strip(offset, self._mask(is_hidden), self._here(ahead.float()) if self.is_scored else None)

    def _mask(self, is_hidden: Tensor) -> Tensor:
        mask = torch.zeros(is_hidden.shape, dtype=self.like.dtype).masked_fill_(is_hidden, float("-inf"))
        return self._here(mask)

    def _here(self, x: Tensor) -> Tensor:
        return x.to(self.like.device, non_blocking=True)
