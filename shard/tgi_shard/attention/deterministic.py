"""Attention in which a query's result depends on nothing but the query and the keys and values it may see.

Keys are taken in tiles of KEYS positions, counted from position 0. Of each tile, and for each query, scores,
the sum of their exponentials and the weighted sum of values come from calls of one shape (same_bits.py), in
float32. A query's tiles are then added up one after the other, from the first it may see on. So neither the
other rows of a step, nor how a prompt is cut into chunks, nor whether a token is a prompt's or was sampled
makes a difference. A tile of which a query sees nothing adds zeros, which change no sum.

A step becomes one batch of units, each a few queries of a row against one tile of its keys. Units stand in
the order in which they are added up: the first tiles of all rows, then the second ones of the rows that have
some, and so on.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tgi_shard import same_bits
from tgi_shard.attention.backend import Heads
from tgi_shard.attention.reference import begun_blocks
from tgi_shard.kv_cache import KVCache
from tgi_shard.same_bits import Sizes, padded
from tgi_shard.step import StepInputs

KEYS = 64
# A chunk's unit: many queries share what it takes to fetch the keys, but a short chunk is padded to as many.
_MAX_QUERIES = 64
_MAX_ROWS = 512  # queries x heads of a KV head; more only if the heads of one are more
_FEW_ROWS = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # of a unit with one query, if they agree with a chunk's
_BATCHES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_MAX_NUMBERS = 2**23  # scores, or keys and values, of the units that are computed together


@dataclass(frozen=True, slots=True)
class DeterministicAttention:
    heads: Heads

    def plan(self, inputs: StepInputs, kv_cache: KVCache) -> "DeterministicPlan":
        shape = _Shape.of(self.heads, inputs.token_ids.device)
        begun = begun_blocks(inputs, kv_cache.block_size)
        return DeterministicPlan(self.heads, shape, inputs, kv_cache, begun)


@dataclass(frozen=True, slots=True)
class _Unit:
    """The shape of a unit's two multiplications."""

    num_queries: int
    group: int  # heads of a KV head, padded
    batches: Sizes  # how many may be multiplied in a call

    @property
    def num_rows(self) -> int:
        return self.num_queries * self.group


@dataclass(frozen=True, slots=True)
class _Shape:
    """How the queries of chunks, and those that are alone, are put into units."""

    chunk: _Unit
    single: _Unit

    @classmethod
    def of(cls, heads: Heads, device: torch.device) -> "_Shape":
        group = heads.num_heads // heads.num_kv_heads
        return _shape(group, padded(heads.head_dim), device, torch.get_num_threads())


@cache
def _shape(group: int, head_dim: int, device: torch.device, num_threads: int) -> _Shape:
    """num_threads: kernels are chosen by it too."""
    num_queries = min(_MAX_QUERIES, 1 << max(0, (_MAX_ROWS // group).bit_length() - 1))
    num_rows = padded(num_queries * group)
    if num_rows % num_queries:
        num_rows = num_queries * padded(group)
    examples = _Examples.of(head_dim, device)
    sizes = same_bits.agreeing(
        lambda rows: examples.multiplied(rows, 1),
        num_rows,
        [size for size in _FEW_ROWS if group <= size < num_rows],
    )
    fewest = sizes.sizes[0]

    def unit(num_queries: int, num_rows: int) -> _Unit:
        rows = torch.arange(num_rows) % same_bits.NUM_EXAMPLES
        expected = examples.multiplied(rows, 1)
        batches = [
            size
            for size in _BATCHES
            if torch.equal(examples.multiplied(rows, size), expected.repeat(size, 1))
        ]
        return _Unit(num_queries, num_rows // num_queries, Sizes(tuple(batches)))

    chunk = unit(num_queries, num_rows)
    return _Shape(chunk, unit(1, fewest) if fewest < num_rows else chunk)


@dataclass(frozen=True, slots=True)
class _Examples:
    """Numbers to try a unit's two multiplications with."""

    query: Tensor  # [examples, head_dim]
    key: Tensor  # [KEYS, head_dim]
    weights: Tensor  # [examples, KEYS]
    value: Tensor  # [KEYS, head_dim]

    @classmethod
    def of(cls, head_dim: int, device: torch.device) -> "_Examples":
        query, key = same_bits.cancelling(same_bits.NUM_EXAMPLES, KEYS, head_dim, torch.float32, device)
        weights, value = same_bits.cancelling(same_bits.NUM_EXAMPLES, head_dim, KEYS, torch.float32, device)
        return cls(query, key, weights, value.t().contiguous())

    def multiplied(self, rows: Tensor, num_units: int) -> Tensor:
        """Both results side by side, of the examples `rows` in every unit: [num_units x rows, ..]."""
        rows = rows.to(self.query.device)

        def units(x: Tensor) -> Tensor:
            return x.expand(num_units, *x.shape).contiguous()

        scores = _scores(units(self.query[rows]), units(self.key))
        sums = torch.bmm(units(self.weights[rows]), units(self.value))
        return torch.cat((scores, sums), -1).flatten(0, 1)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Of each unit: [units, rows, head_dim] and [units, KEYS, head_dim] -> [units, rows, KEYS]."""
    return torch.bmm(query, key.transpose(1, 2))


@dataclass(frozen=True, slots=True)
class _Queries:
    """Some new tokens of a row, and the tiles of keys that any of them sees."""

    row: int
    first_token: int  # among the step's
    num_tokens: int
    first_position: int
    first_key: int  # the first position that any of them sees
    first_tile: int
    num_tiles: int


@dataclass(frozen=True, slots=True)
class _Batch:
    """Units that are computed together: of n sets of queries, those with most tiles first."""

    unit: _Unit
    token_indices: Tensor  # [n x num_queries] among the step's tokens; padding repeats a set's last one
    num_running: tuple[int, ...]  # for each tile, how many sets have one; never rising
    queries_of: Tensor  # [U] which set a unit's queries are
    slot_ids: Tensor  # [U x KEYS]
    is_hidden: Tensor  # [U, 1, num_queries, 1, KEYS] bool
    ahead: Tensor  # the same shape, float32: key's position minus query's


@dataclass(frozen=True, slots=True)
class DeterministicPlan:
    heads: Heads
    shape: _Shape
    inputs: StepInputs
    kv_cache: KVCache
    begun_blocks: Tensor | None
    # (window, stretch) -> what the layers with those share
    _batches: dict[tuple[int | None, int | None], tuple[_Batch, ...]] = field(default_factory=dict)

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
        if self.begun_blocks is not None:
            self.kv_cache.stores[layer].index_fill_(0, self.begun_blocks, 0)
        slots = self.kv_cache.slots(layer)
        slots.index_copy_(0, self.inputs.slot_ids, key_value)
        batches = self._batches.get((window, stretch))
        if batches is None:
            planner = _Planner(self.inputs, self.kv_cache.block_size, self.shape, self.heads, window, stretch)
            batches = self._batches[window, stretch] = tuple(planner.batches())
        scoring = _Scoring(softcap, self._per_head(slopes), self._per_head(sinks))
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for batch in batches:
            queries = self._queries(batch, query, scale)
            key, value = self._keys(batch, slots)
            attended = scoring.attend(batch, queries, key, value)
            own = attended[..., : self._group, : self.heads.head_dim].transpose(1, 2)  # a token a row
            out.index_copy_(0, batch.token_indices, own.reshape(-1, *query.shape[1:]).to(out.dtype))
        return out.flatten(1)

    @property
    def _group(self) -> int:
        """Heads of a KV head."""
        return self.heads.num_heads // self.heads.num_kv_heads

    def _per_head(self, numbers: Tensor | None) -> Tensor | None:
        return None if numbers is None else numbers.view(self.heads.num_kv_heads, 1, self._group)

    def _queries(self, batch: _Batch, query: Tensor, scale: float) -> Tensor:
        """[n, kv heads, rows of a unit, features] float32, scaled."""
        unit, num_kv_heads, head_dim = batch.unit, self.heads.num_kv_heads, self.heads.head_dim
        chosen = query.index_select(0, batch.token_indices)
        chosen = chosen.view(-1, unit.num_queries, num_kv_heads, self._group, head_dim)
        shape = (len(chosen), num_kv_heads, unit.num_queries, unit.group, padded(head_dim))
        rows = chosen.new_zeros(shape, dtype=torch.float32)
        rows[..., : self._group, :head_dim] = chosen.transpose(1, 2)
        return rows.mul_(scale).flatten(2, 3)

    def _keys(self, batch: _Batch, slots: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of each unit, [U x kv heads, KEYS, features] float32; one and the same if K is V."""
        gathered = slots.index_select(0, batch.slot_ids)  # [U x KEYS, 2 or 1, kv heads, head_dim]
        num_parts, num_kv_heads, head_dim = gathered.shape[1:]
        parts = gathered.view(-1, KEYS, num_parts, num_kv_heads, head_dim).permute(2, 0, 3, 1, 4)
        if padded(head_dim) != head_dim:
            parts = F.pad(parts, (0, padded(head_dim) - head_dim))
        parts = parts.to(torch.float32, memory_format=torch.contiguous_format).contiguous().flatten(1, 2)
        return parts[0], parts[-1]


@dataclass(frozen=True, slots=True)
class _Scoring:
    """From queries, keys and values to outputs. Numbers of heads: [kv heads, 1, heads of one]."""

    softcap: float | None
    slopes: Tensor | None
    sinks: Tensor | None

    def attend(self, batch: _Batch, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query: [n, kv heads, rows, features]. [n, kv heads, queries, heads of one (padded), features]."""
        unit, num_kv_heads = batch.unit, query.shape[1]
        queries = query.index_select(0, batch.queries_of).flatten(0, 1)
        scores = unit.batches.call(_scores, queries, key)
        scores = scores.view(-1, num_kv_heads, unit.num_queries, unit.group, KEYS)
        if self.softcap is not None:
            scores.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.slopes is not None:
            scores.add_(_widened(self.slopes, unit).unsqueeze(-1) * batch.ahead)
        scores.masked_fill_(batch.is_hidden, float("-inf"))
        largest = self._largest(batch, scores.amax(-1))
        weights = scores.sub_(largest.index_select(0, batch.queries_of).unsqueeze(-1)).exp_()
        total = self._added(batch, weights.sum(-1))
        if self.sinks is not None:
            total.add_((_widened(self.sinks, unit) - largest).exp_())
        sums = unit.batches.call(torch.bmm, weights.view(-1, unit.num_rows, KEYS), value)
        sums = sums.view(-1, num_kv_heads, unit.num_queries, unit.group, sums.shape[-1])
        return self._added(batch, sums).div_(total.unsqueeze(-1))

    def _largest(self, batch: _Batch, of_units: Tensor) -> Tensor:
        """Each query's largest score in all its tiles: [n, kv heads, queries, heads of one]."""
        first, *others = of_units.split(batch.num_running)
        largest = first.clone()
        for tile in others:
            part = largest[: len(tile)]
            torch.maximum(part, tile, out=part)
        return largest if self.sinks is None else torch.maximum(largest, _widened(self.sinks, batch.unit))

    def _added(self, batch: _Batch, of_units: Tensor) -> Tensor:
        """The sum over a query's tiles, in their order."""
        total, *others = of_units.split(batch.num_running)
        for tile in others:
            total[: len(tile)].add_(tile)
        return total


def _widened(of_heads: Tensor, unit: _Unit) -> Tensor:
    """[kv heads, 1, heads of one] -> [kv heads, 1, heads of one, padded]."""
    return F.pad(of_heads, (0, unit.group - of_heads.shape[-1]))


@dataclass(frozen=True, slots=True)
class _Planner:
    """Turns a step's lengths into batches, on the host: nothing here waits for the device."""

    inputs: StepInputs
    block_size: int
    shape: _Shape
    heads: Heads
    window: int | None
    stretch: int | None

    def batches(self) -> Iterator[_Batch]:
        singles: list[_Queries] = []
        chunks: list[_Queries] = []
        start = 0
        for row, (num_new, context_len) in enumerate(
            zip(self.inputs.query_lens, self.inputs.context_lens_host, strict=True)
        ):
            sets, size = (singles, 1) if num_new == 1 else (chunks, self.shape.chunk.num_queries)
            for first in range(0, num_new, size):
                position = context_len - num_new + first
                sets.append(self._queries(row, start + first, min(size, num_new - first), position))
            start += num_new
        for unit, sets in ((self.shape.single, singles), (self.shape.chunk, chunks)):
            yield from self._cut(unit, sorted(sets, key=lambda queries: -queries.num_tiles))

    def _first_key(self, position: int) -> int:
        if self.stretch is not None:
            return position // self.stretch * self.stretch
        return 0 if self.window is None else max(0, position - self.window + 1)

    def _queries(self, row: int, first_token: int, num_tokens: int, position: int) -> _Queries:
        first_key = self._first_key(position)
        first_tile = first_key // KEYS
        num_tiles = (position + num_tokens - 1) // KEYS + 1 - first_tile
        return _Queries(row, first_token, num_tokens, position, first_key, first_tile, num_tiles)

    def _cut(self, unit: _Unit, sets: list[_Queries]) -> Iterator[_Batch]:
        """As many sets together as _MAX_NUMBERS allows, but at least one."""
        per_key = self.heads.num_kv_heads * max(unit.num_rows, 2 * self.heads.head_dim)
        max_units = _MAX_NUMBERS // (per_key * KEYS)
        part: list[_Queries] = []
        num_units = 0
        for queries in sets:
            if part and num_units + queries.num_tiles > max_units:
                yield self._batch(unit, part)
                part, num_units = [], 0
            part.append(queries)
            num_units += queries.num_tiles
        if part:
            yield self._batch(unit, part)

    def _batch(self, unit: _Unit, sets: list[_Queries]) -> _Batch:
        rows, first_tokens, num_tokens, positions, first_keys, first_tiles, num_tiles = np.array(
            [
                (q.row, q.first_token, q.num_tokens, q.first_position, q.first_key, q.first_tile, q.num_tiles)
                for q in sets
            ]
        ).T
        places = np.minimum(np.arange(unit.num_queries), num_tokens[:, None] - 1)  # [n, num_queries]
        num_running = (num_tiles[:, None] > np.arange(num_tiles[0])).sum(0)
        queries_of = np.concatenate([np.arange(count) for count in num_running])
        tiles = first_tiles[queries_of] + np.repeat(np.arange(len(num_running)), num_running)
        keys = tiles[:, None] * KEYS + np.arange(KEYS)  # [U, KEYS] positions
        of_queries = (positions[:, None] + places)[queries_of][:, :, None]
        ahead = keys[:, None] - of_queries  # [U, num_queries, KEYS]
        is_hidden = ahead > 0
        if self.window is not None:
            is_hidden |= ahead <= -self.window
        if self.stretch is not None:
            is_hidden |= keys[:, None] < of_queries // self.stretch * self.stretch
        # What all of them are blind to may be another sequence's by now, or not written: not read at all.
        last_keys = positions + num_tokens - 1
        read = np.clip(keys, first_keys[queries_of][:, None], last_keys[queries_of][:, None])
        tables = self.inputs.block_tables
        read_here = self._here(read)
        blocks = tables[self._here(rows[queries_of])[:, None], read_here // self.block_size]
        shape = (len(keys), 1, unit.num_queries, 1, KEYS)
        return _Batch(
            unit=unit,
            token_indices=self._here((first_tokens[:, None] + places).flatten()),
            num_running=tuple(num_running.tolist()),
            queries_of=self._here(queries_of),
            slot_ids=(blocks * self.block_size + read_here % self.block_size).flatten(),
            is_hidden=self._here(is_hidden).view(shape),
            ahead=self._here(ahead.astype(np.float32)).view(shape),
        )

    def _here(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(self.inputs.token_ids.device, non_blocking=True)
