"""Every backend against attention written out row by row, for batches as ragged as they come."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tgi_shard.attention.backend import AttentionBackend, Heads
from tgi_shard.attention.deterministic import DeterministicAttention
from tgi_shard.attention.reference import ReferenceAttention
from tgi_shard.kv_cache import KVCache, KVShape
from tgi_shard.step import StepInputs

BLOCK_SIZE = 16
SCALE = 0.3
BACKENDS = pytest.mark.parametrize(
    "backend", [ReferenceAttention, DeterministicAttention], ids=["reference", "deterministic"]
)
Backend = Callable[[Heads], AttentionBackend]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Batch:
    """Rows of (new tokens, tokens before them) with random K and V, those before already in the store."""

    def __init__(
        self, rows: Sequence[tuple[int, int]], heads: Heads, dtype: torch.dtype, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.heads, self.rows = heads, rows
        self.context_lens = [new + before for new, before in rows]
        num_blocks = sum(-(-length // BLOCK_SIZE) for length in self.context_lens)
        shape = KVShape(1, heads.num_kv_heads, heads.head_dim, dtype)
        self.kv_cache = KVCache.allocate(shape, num_blocks, BLOCK_SIZE, torch.device("cpu"))
        free = list(range(num_blocks))
        random.Random(seed).shuffle(free)
        self.tables = [[free.pop() for _ in range(-(-n // BLOCK_SIZE))] for n in self.context_lens]
        self.key_values = [
            torch.randn(n, 2, heads.num_kv_heads, heads.head_dim, generator=generator).to(dtype)
            for n in self.context_lens
        ]
        self.queries = [
            torch.randn(new, heads.num_heads, heads.head_dim, generator=generator).to(dtype)
            for new, _ in rows
        ]
        for row, (_, before) in enumerate(rows):
            self.kv_cache.slots(0)[self.slots(row)[:before]] = self.key_values[row][:before]

    def slots(self, row: int) -> Tensor:
        positions = torch.arange(self.context_lens[row])
        blocks = torch.tensor(self.tables[row])[positions // BLOCK_SIZE]
        return blocks * BLOCK_SIZE + positions % BLOCK_SIZE

    def inputs(self) -> StepInputs:
        new = [new for new, _ in self.rows]
        width = max(map(len, self.tables))
        return StepInputs(
            token_ids=torch.zeros(sum(new), dtype=torch.int64),
            positions=torch.cat([torch.arange(before, before + new) for new, before in self.rows]),
            slot_ids=torch.cat([self.slots(row)[before:] for row, (_, before) in enumerate(self.rows)]),
            query_starts=torch.tensor([0, *new]).cumsum(0),
            context_lens=torch.tensor(self.context_lens),
            block_tables=torch.tensor([table + [0] * (width - len(table)) for table in self.tables]),
            logit_indices=torch.zeros(0, dtype=torch.int64),
            query_lens=tuple(new),
            context_lens_host=tuple(self.context_lens),
            prompt_lens=tuple(self.context_lens),
        )

    @torch.inference_mode()
    def attend(self, backend: Backend, window: int | None, **scoring: Any) -> list[Tensor]:
        """Each row's output: [new tokens, num_heads x head_dim]."""
        fresh = [kv[before:] for kv, (_, before) in zip(self.key_values, self.rows, strict=True)]
        plan = backend(self.heads).plan(self.inputs(), self.kv_cache)
        out = plan.attend(0, torch.cat(self.queries), torch.cat(fresh), scale=SCALE, window=window, **scoring)
        return list(out.split([new for new, _ in self.rows]))

    def expected(
        self,
        row: int,
        window: int | None,
        softcap: float | None = None,
        slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        stretch: int | None = None,
    ) -> Tensor:
        """In float32 and one query at a time."""
        new, before = self.rows[row]
        group = self.heads.num_heads // self.heads.num_kv_heads
        key, value = self.key_values[row].float().repeat_interleave(group, dim=2).unbind(1)
        outputs = []
        for index in range(new):
            last = before + index + 1
            first = 0 if window is None else max(0, last - window)
            if stretch is not None:
                first = (before + index) - (before + index) % stretch
            scores = torch.einsum("hd,thd->ht", self.queries[row][index].float(), key[first:last]) * SCALE
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if slopes is not None:
                scores = scores - slopes.unsqueeze(1) * (last - 1 - torch.arange(first, last))
            sink = torch.zeros(len(scores)) if sinks is None else sinks.exp()
            weights = scores.exp() / (scores.exp().sum(-1) + sink).unsqueeze(1)
            outputs.append(torch.einsum("ht,thd->hd", weights, value[first:last]).flatten())
        return torch.stack(outputs)


MIXTURES: dict[str, Sequence[tuple[int, int]]] = {
    "decodes": [(1, 0), (1, 15), (1, 16), (1, 47), (1, 300)],
    "decodes of very different lengths": [(1, 3), (1, 2000), (1, 20), (1, 1100), (1, 900), (1, 5)],
    "prompts": [(2, 0), (16, 0), (33, 0), (300, 0)],
    "chunks": [(2, 5), (16, 16), (30, 77), (520, 40)],
    "all": [(1, 40), (7, 0), (1, 0), (260, 33), (1, 700), (20, 3)],
}


@pytest.mark.parametrize("window", [None, 1, 16, 50])
@pytest.mark.parametrize("mixture", MIXTURES)
@BACKENDS
def test_equals_attention_row_by_row(backend: Backend, mixture: str, window: int | None) -> None:
    batch = Batch(MIXTURES[mixture], Heads(num_heads=6, num_kv_heads=2, head_dim=8), torch.float32)
    for row, ours in enumerate(batch.attend(backend, window)):
        torch.testing.assert_close(ours, batch.expected(row, window), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scoring", [{}, {"softcap": 0.7}], ids=["fused", "softcap"])
@pytest.mark.parametrize("stretch", [1, 16, 50, 300])
@pytest.mark.parametrize("mixture", MIXTURES)
@BACKENDS
def test_tokens_see_their_own_stretch(
    backend: Backend, mixture: str, stretch: int, scoring: dict[str, Any]
) -> None:
    batch = Batch(MIXTURES[mixture], Heads(num_heads=6, num_kv_heads=2, head_dim=8), torch.float32)
    for row, ours in enumerate(batch.attend(backend, None, stretch=stretch, **scoring)):
        expected = batch.expected(row, None, stretch=stretch, **scoring)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize(
    "scoring",
    [
        {"softcap": 0.7},
        {"slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.03, 0.01])},
        {"sinks": torch.tensor([0.5, -2.0, 1.5, 0.0, 3.0, -1.0])},
        {"softcap": 2.0, "slopes": torch.full((6,), 0.1), "sinks": torch.zeros(6)},
    ],
    ids=["softcap", "slopes", "sinks", "all"],
)
@BACKENDS
def test_scores_that_fused_attention_does_not_know(
    backend: Backend, scoring: dict[str, Any], mixture: str, window: int | None
) -> None:
    batch = Batch(MIXTURES[mixture], Heads(num_heads=6, num_kv_heads=2, head_dim=8), torch.float32)
    for row, ours in enumerate(batch.attend(backend, window, **scoring)):
        expected = batch.expected(row, window, **scoring)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "heads", [Heads(4, 4, 16), Heads(4, 1, 20), Heads(14, 2, 64)], ids=["no-gqa", "one-kv-head", "gqa"]
)
@BACKENDS
def test_head_layouts_and_dtypes(backend: Backend, heads: Heads, dtype: torch.dtype) -> None:
    batch = Batch(MIXTURES["all"], heads, dtype)
    for row, ours in enumerate(batch.attend(backend, None)):
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(ours.float(), batch.expected(row, None), rtol=tolerance, atol=tolerance)


@BACKENDS
def test_this_steps_keys_and_values_are_stored(backend: Backend) -> None:
    batch = Batch(MIXTURES["all"], Heads(4, 2, 8), torch.float32)
    batch.attend(backend, None)
    key, value = batch.kv_cache.layers[0]
    for row, key_value in enumerate(batch.key_values):
        slots = batch.slots(row)
        assert torch.equal(key.reshape(-1, 2, 8)[slots], key_value[:, 0])
        assert torch.equal(value.reshape(-1, 2, 8)[slots], key_value[:, 1])


@BACKENDS
def test_a_broken_row_harms_no_neighbour(backend: Backend) -> None:
    rows, heads = [(1, 20), (5, 0), (1, 9)], Heads(4, 2, 8)
    sound, broken = (Batch(rows, heads, torch.float32) for _ in range(2))
    broken.key_values[1].fill_(float("nan"))
    broken.queries[1].fill_(float("nan"))
    expected, got = sound.attend(backend, None), broken.attend(backend, None)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[2], expected[2])
    assert broken.kv_cache.slots(0)[broken.slots(1)].isnan().all(), "the sequence itself must stay broken"


@pytest.mark.parametrize("window", [None, 5])
@BACKENDS
def test_a_broken_sequence_leaves_nothing_behind_in_its_blocks(backend: Backend, window: int | None) -> None:
    """Chunk by chunk, over blocks full of NaN, with decodes: what was there before never shows."""
    heads, num_tokens, chunks = Heads(4, 2, 8), 40, (16, 5, 1, 13, 1, 1, 1, 1, 1)
    whole = Batch([(num_tokens, 0)], heads, torch.float32)
    expected = whole.expected(0, window)
    whole.kv_cache.stores[0].fill_(float("nan"))
    before = 0
    for new in chunks:
        part = Batch([(new, before)], heads, torch.float32)
        part.kv_cache, part.tables = whole.kv_cache, whole.tables
        part.key_values = [whole.key_values[0][: before + new]]
        part.queries = [whole.queries[0][before : before + new]]
        (out,) = part.attend(backend, window)
        torch.testing.assert_close(out, expected[before : before + new], rtol=1e-5, atol=1e-5)
        before += new
    assert before == num_tokens


@pytest.mark.parametrize("has_values", [True, False])
def test_a_block_costs_what_the_shape_says(has_values: bool) -> None:
    shape = KVShape(3, local_num_kv_heads=2, head_dim=8, dtype=torch.bfloat16, has_values=has_values)
    kv_cache = KVCache.allocate(shape, 5, BLOCK_SIZE, torch.device("cpu"))
    assert sum(store.nbytes for store in kv_cache.stores) == 5 * shape.bytes_per_block(BLOCK_SIZE)


SCORINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 50},
    "stretch": {"stretch": 50},
    "all": {"softcap": 2.0, "slopes": torch.full((6,), 0.1), "sinks": torch.zeros(6)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("heads", [Heads(6, 2, 8), Heads(6, 6, 20), Heads(6, 1, 64)], ids=str)
def test_the_same_bits_in_every_batch_and_chunk(heads: Heads, scoring: str, dtype: torch.dtype) -> None:
    """All rows together; each alone; each token by token."""
    options = {"window": None} | SCORINGS[scoring]
    rows = [(1, 40), (7, 0), (1, 0), (260, 33), (1, 700), (20, 3), (129, 0)]
    batch = Batch(rows, heads, dtype)
    together = batch.attend(DeterministicAttention, **options)
    for row, (new, before) in enumerate(rows):
        for first, last in [(0, new), *((place, place + 1) for place in range(new))]:
            alone = Batch([(last - first, before + first)], heads, dtype)
            alone.kv_cache, alone.tables = batch.kv_cache, [batch.tables[row]]
            alone.key_values = [batch.key_values[row][: before + last]]
            alone.queries = [batch.queries[row][first:last]]
            (out,) = alone.attend(DeterministicAttention, **options)
            assert torch.equal(out, together[row][first:last]), (row, first, last)
