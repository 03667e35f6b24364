"""Slots: what a step is told about its sequences is what plain lists of tokens and blocks say."""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from engine_driver import make_plan
from tgi_shard.plan import AddSequence
from tgi_shard.slots import NUM_SURPLUS_TOKENS, Slots

BLOCK_SIZE = 4
NUM_BLOCKS = 40
MAX_SEQUENCES = 5
MAX_TOTAL_TOKENS = 30


def make_slots() -> Slots:
    return Slots(
        max_sequences=MAX_SEQUENCES,
        max_total_tokens=MAX_TOTAL_TOKENS,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        vocab_size=1000,
        device=torch.device("cpu"),
    )


@dataclass
class Model:
    """A sequence as plain lists."""

    tokens: list[int]
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)


@pytest.mark.parametrize("seed", range(8))
def test_random_walk(seed: int) -> None:
    """Sequences come with or without a cached prefix, run in chunks, sample, go; slots are used again."""
    draw = random.Random(seed)
    slots = make_slots()
    alive: dict[int, Model] = {}
    free = list(range(NUM_BLOCKS))
    next_id = 1
    for step_id in range(1, 150):
        drop = [i for i in alive if draw.random() < 0.05 or len(alive[i].tokens) >= MAX_TOTAL_TOKENS]
        for i in drop:
            free += alive.pop(i).blocks
        add = []
        to_grant: dict[int, list[int]] = {}
        while len(alive) < MAX_SEQUENCES and draw.random() < 0.4:
            tokens = [draw.randrange(1000) for _ in range(draw.randint(1, 20))]
            num_cached = draw.randrange(len(tokens)) // BLOCK_SIZE * BLOCK_SIZE
            alive[next_id] = Model(tokens, num_cached)
            num_prompt = draw.randint(1, len(tokens))
            prompt, output = np.array(tokens[:num_prompt]), np.array(tokens[num_prompt:], np.int64)
            add.append(AddSequence(next_id, prompt, output, num_cached_tokens=num_cached))
            next_id += 1
        draw.shuffle(free)
        run = {}
        for i, model in alive.items():
            num_tokens = draw.randint(0, len(model.tokens) - model.num_computed)
            num_new = -(-(model.num_computed + num_tokens) // BLOCK_SIZE) - len(model.blocks)
            if num_tokens and num_new <= len(free):
                to_grant[i] = [free.pop() for _ in range(max(0, num_new))]
                model.blocks += to_grant[i]
                run[i] = (num_tokens, to_grant[i])
        rows, failed = slots.apply(make_plan(step_id, drop=drop, add=add, run=run))
        assert failed == []
        assert slots.ids(rows.slots) == list(run)
        assert len(set(slots.slot_of.values())) == len(alive)
        if not run:
            continue

        ends = np.cumsum(rows.num_tokens)
        inputs = slots.inputs(rows, ends - 1)
        assert inputs.query_starts.tolist() == [0, *ends]
        assert list(inputs.query_lens) == [num_tokens for num_tokens, _ in run.values()]
        token_ids, positions, slot_ids = [], [], []
        for row, (i, (num_tokens, _)) in enumerate(run.items()):
            model = alive[i]
            span = range(model.num_computed, model.num_computed + num_tokens)
            token_ids += [model.tokens[position] for position in span]
            positions += span
            slot_ids += [model.blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in span]
            num_blocks = -(-span.stop // BLOCK_SIZE)
            assert inputs.block_tables[row, :num_blocks].tolist() == model.blocks[:num_blocks]
            assert inputs.context_lens[row] == inputs.context_lens_host[row] == span.stop
        assert inputs.token_ids.tolist() == token_ids
        assert inputs.positions.tolist() == positions
        assert inputs.slot_ids.tolist() == slot_ids
        assert inputs.logit_indices.tolist() == (ends - 1).tolist()

        sampling = rows.slots[slots.reaches_end(rows)]
        slots.computed(rows)
        sampled = torch.tensor([draw.randrange(1000) for _ in sampling], dtype=torch.int64)
        history = slots.history(sampling)
        expected = []
        for i, (num_tokens, _) in run.items():
            alive[i].num_computed += num_tokens
            if alive[i].num_computed == len(alive[i].tokens):
                expected.append(alive[i])
        if expected:
            assert history.last_token_ids() == [model.tokens[-1] for model in expected]
            padded, is_real, _ = history.padded()
            rows_of = [ids[real].tolist() for ids, real in zip(padded, is_real, strict=True)]
            assert rows_of == [model.tokens for model in expected]
            slots.append(sampling, sampled)
        for model, token_id in zip(expected, sampled.tolist(), strict=True):
            model.tokens.append(token_id)


def test_every_slot_can_be_used_again_at_once() -> None:
    """The plan that drops a sequence may give its slot and its blocks to another."""
    slots = make_slots()
    one = np.array([1, 2, 3])
    none = np.empty(0, np.int64)
    for step_id in range(1, 10):
        ids = [step_id * 100 + i for i in range(MAX_SEQUENCES)]
        rows, failed = slots.apply(
            make_plan(
                step_id,
                drop=[i - 100 for i in ids],
                add=[AddSequence(i, one, none) for i in ids],
                run={i: (3, [k]) for k, i in enumerate(ids)},
            )
        )
        assert failed == []
        assert len(rows) == MAX_SEQUENCES
    _, failed = slots.apply(make_plan(10, add=[AddSequence(1, one, none)]))
    assert [failure.message for failure in failed] == ["more than 5 sequences"]


def test_a_sequence_can_run_ahead_of_its_limit_and_no_further() -> None:
    """The plans in flight when a sequence ends may compute a surplus; it has a place in the tensors."""
    slots = make_slots()
    token_ids = np.ones(MAX_TOTAL_TOKENS - 1, np.int64)
    add = [AddSequence(1, token_ids, np.empty(0, np.int64))]
    run = {1: (MAX_TOTAL_TOKENS - 1, list(range(8)))}
    for step_id in range(1, NUM_SURPLUS_TOKENS + 2):
        rows, failed = slots.apply(make_plan(step_id, add=add, run=run))
        assert failed == []
        slots.inputs(rows, np.array([0]))
        slots.computed(rows)
        slots.append(rows.slots, torch.tensor([7]))
        add, run = [], {1: (1, [8] if step_id == 3 else [])}
    assert slots.num_known[slots.slot_of[1]] == MAX_TOTAL_TOKENS + NUM_SURPLUS_TOKENS
    _, failed = slots.apply(make_plan(9, run={1: (1, [8])}))
    assert [failure.message for failure in failed] == ["the sequence outgrows max_total_tokens = 30"]


def test_a_refused_sequence_is_passed_over_until_it_is_dropped() -> None:
    slots = make_slots()
    good, bad = np.array([1, 2]), np.array([1000])
    none = np.empty(0, np.int64)
    _, failed = slots.apply(make_plan(1, add=[AddSequence(1, bad, none)], run={1: (1, [0])}))
    assert len(failed) == 1
    rows, failed = slots.apply(make_plan(2, run={1: (1, [])}))
    assert (len(rows), failed) == (0, [])
    rows, failed = slots.apply(make_plan(3, drop=[1], add=[AddSequence(1, good, none)], run={1: (2, [0])}))
    assert (len(rows), failed) == (1, [])
    rows, failed = slots.apply(make_plan(4, drop=[1], run={1: (1, [])}))
    assert len(rows) == 0
    assert [failure.message for failure in failed] == ["there is no sequence 1"]
