"""The scheduler against a scripted shard that checks every slot it reads: seeded random walks."""

import random
from collections import deque

import pytest

from scripted_shard import ScriptedShard, next_token
from tgi_proto import generate_pb2 as pb
from tgi_router.request import FinishReason, Request, SampledToken, Sampling
from tgi_router.scheduling.block_allocator import BlockAllocator
from tgi_router.scheduling.plan import StepPlan, StepResult
from tgi_router.scheduling.scheduler import Limits, Scheduler
from tgi_router.scheduling.sequence import Sequence
from tgi_router.shards.client import decode_result, encode_plan


class Collector:
    """A listener that keeps what it hears and ends after `length` tokens."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.token_ids: list[int] = []

    def on_scheduled(self) -> None:
        pass

    def on_prompt_logprobs(self, start_position: int, logprobs: list[float]) -> None:
        pass

    def on_token(self, token: SampledToken) -> FinishReason | None:
        self.token_ids.append(token.token_id)
        return "length" if len(self.token_ids) == self.length else None

    def on_error(self, error: Exception) -> None:
        raise AssertionError(error)


def expected_tokens(prompt: tuple[int, ...], length: int, vocab_size: int) -> list[int]:
    token_ids = list(prompt)
    for _ in range(length):
        token_ids.append(next_token(token_ids, vocab_size))
    return token_ids[len(prompt) :]


class Walk:
    """Scheduler and shard side by side, with up to two plans between them."""

    def __init__(
        self, *, num_blocks: int, block_size: int, limits: Limits, share_prefixes: bool = True
    ) -> None:
        self.shard = ScriptedShard(num_blocks=num_blocks, block_size=block_size, vocab_size=50)
        self.shard.max_step_tokens, self.shard.max_sequences = limits.max_step_tokens, limits.max_sequences
        self.share_prefixes = share_prefixes
        self.scheduler = Scheduler(limits, self._allocator())
        self.in_flight: deque[tuple[StepPlan, pb.StepPlan]] = deque()
        self.alive: dict[int, Sequence] = {}
        self.finished: dict[int, Sequence] = {}
        self.num_added = 0

    def _allocator(self) -> BlockAllocator:
        return BlockAllocator(
            self.shard.num_blocks, self.shard.block_size, share_prefixes=self.share_prefixes
        )

    def add(
        self, prompt: tuple[int, ...], max_new_tokens: int, ends_after: int, prompt_logprobs: bool = False
    ) -> Sequence:
        self.num_added += 1
        request = Request("r", "", prompt, Sampling(), max_new_tokens, prompt_logprobs=prompt_logprobs)
        sequence = Sequence.of(self.num_added, request, Collector(min(ends_after, max_new_tokens)))
        self.alive[sequence.sequence_id] = sequence
        self.scheduler.add(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        del self.alive[sequence.sequence_id]
        self.scheduler.remove(sequence)

    def send(self) -> bool:
        plan = self.scheduler.plan()
        if plan is None:
            return False
        self.in_flight.append((plan, pb.RunRequest.FromString(encode_plan(plan)).plan))
        return True

    def receive(self) -> None:
        plan, message = self.in_flight.popleft()
        result = decode_result(self.shard.apply(message).SerializeToString())
        for sequence, token in self.scheduler.confirm(plan, result):
            if sequence.listener.on_token(token) is not None:
                self.scheduler.remove(sequence)
                self.finished[sequence.sequence_id] = self.alive.pop(sequence.sequence_id)

    def lose_shard(self) -> None:
        self.in_flight.clear()
        self.shard.forget()
        self.shard.kv.clear()
        self.scheduler.restart(self._allocator())

    def run_dry(self, max_steps: int = 5000) -> None:
        for _ in range(max_steps):
            while len(self.in_flight) < 2 and self.send():
                pass
            if not self.in_flight:
                break
            self.receive()
            self.check()
        assert not self.alive, "a sequence starved"

    def check(self) -> None:
        scheduler = self.scheduler
        scheduler.allocator.check([sequence.block_ids for sequence in scheduler.running.values()])
        assert set(scheduler.running) | {sequence.sequence_id for sequence in scheduler.waiting} == set(
            self.alive
        )
        assert len(scheduler.running) <= scheduler.limits.max_sequences
        for sequence in scheduler.waiting:
            assert sequence.block_ids == []

    def check_answers(self) -> None:
        for sequence in self.finished.values():
            collector = sequence.listener
            assert isinstance(collector, Collector)
            assert collector.token_ids == expected_tokens(
                sequence.request.prompt_token_ids, collector.length, self.shard.vocab_size
            )
        assert self.scheduler.allocator.num_held == 0


@pytest.mark.parametrize("seed", range(40))
def test_random_walk(seed: int) -> None:
    rng = random.Random(seed)
    block_size = rng.choice((1, 3, 4, 8))
    max_sequences = rng.randrange(1, 7)
    walk = Walk(
        num_blocks=64 // block_size + rng.randrange(4),
        block_size=block_size,
        limits=Limits(
            max_step_tokens=max_sequences + rng.randrange(1, 24),
            max_sequences=max_sequences,
            min_tokens_to_wait_for=rng.choice((1, 8, 64)),
        ),
        share_prefixes=seed % 4 != 0,
    )
    for _ in range(300):
        move = rng.random()
        if move < 0.15 and len(walk.alive) < 12:
            prompt = tuple(rng.randrange(3) for _ in range(rng.randrange(1, 30)))
            max_new_tokens = rng.randrange(1, 30)
            walk.add(prompt, max_new_tokens, rng.randrange(1, 40), prompt_logprobs=rng.random() < 0.1)
        elif move < 0.18 and walk.alive:
            walk.cancel(rng.choice(list(walk.alive.values())))
        elif move < 0.19:
            walk.lose_shard()
        elif move < 0.6 and len(walk.in_flight) < 2:
            walk.send()
        elif walk.in_flight:
            walk.receive()
        walk.check()
    walk.run_dry()
    walk.check_answers()
    assert walk.finished


def test_decodes_go_on_while_a_long_prompt_is_processed_in_chunks() -> None:
    walk = Walk(num_blocks=100, block_size=4, limits=Limits(max_step_tokens=8, max_sequences=4))
    talker = walk.add((1, 2, 3), 60, 60)
    walk.send()
    walk.receive()
    walk.add(tuple(range(100)), 2, 2)
    for _ in range(10):
        walk.send()
        plan = walk.in_flight[-1][0]
        assert [row.num_tokens for row in plan.rows] == [1, 7]
        assert plan.rows[0].sequence is talker
        walk.receive()


def test_the_youngest_gives_way_and_comes_back_with_all_its_tokens() -> None:
    walk = Walk(num_blocks=12, block_size=2, limits=Limits(max_step_tokens=32, max_sequences=4))
    for start in range(3):
        walk.add((start, 1, 2), 16, 16)
    walk.run_dry()
    assert walk.scheduler.num_preemptions > 0
    assert len(walk.finished) == 3
    walk.check_answers()


def test_a_second_turn_finds_the_first_ones_blocks() -> None:
    walk = Walk(num_blocks=64, block_size=4, limits=Limits(max_step_tokens=64, max_sequences=4))
    first = walk.add(tuple(range(20)), 12, 12)
    walk.run_dry()
    assert isinstance(first.listener, Collector)
    conversation = (*first.request.prompt_token_ids, *first.listener.token_ids, 7, 7, 7)
    walk.add(conversation, 4, 4)
    walk.run_dry()
    assert walk.scheduler.num_hit_tokens == 28  # 31 of the first 32 tokens were computed: 7 full blocks
    walk.check_answers()


def test_choices_that_come_together_share_one_prefill() -> None:
    walk = Walk(num_blocks=256, block_size=4, limits=Limits(max_step_tokens=512, max_sequences=8))
    prompt = tuple(range(50)) * 4
    for _ in range(5):
        walk.add(prompt, 4, 4)
    other = walk.add((7,) * 30, 4, 4)
    walk.send()
    rows = {row.sequence.sequence_id: row.num_tokens for row in walk.in_flight[-1][0].rows}
    assert rows == {
        1: 200,
        other.sequence_id: 30,
    }  # nobody else computes the prompt; who shares nothing passes
    walk.run_dry()
    assert walk.scheduler.num_hit_tokens == 4 * 196  # all but the block of the last token
    walk.check_answers()


def test_who_waits_for_a_prompt_that_is_cancelled_computes_its_own() -> None:
    walk = Walk(num_blocks=256, block_size=4, limits=Limits(max_step_tokens=64, max_sequences=8))
    prompt = tuple(range(50)) * 4
    first = walk.add(prompt, 4, 4)
    walk.add(prompt, 4, 4)
    walk.send()
    walk.cancel(first)
    walk.run_dry()
    assert len(walk.finished) == 1
    walk.check_answers()


def test_finished_output_is_never_planned_beyond_its_length() -> None:
    walk = Walk(num_blocks=64, block_size=4, limits=Limits(max_step_tokens=64, max_sequences=4))
    walk.add((1, 2, 3), 5, 5)
    walk.run_dry()
    assert walk.shard.num_steps == 5 + 1  # the last plan only drops


def test_scores_that_are_not_finite_are_computed_once_more_without_the_prefix_cache() -> None:
    walk = Walk(num_blocks=64, block_size=4, limits=Limits(max_step_tokens=64, max_sequences=4))
    prompt = tuple(range(20))
    walk.add(prompt, 4, 4)
    walk.run_dry()
    sequence = walk.add(prompt, 12, 12)
    for _ in range(5):
        walk.send()
        walk.receive()
    num_hit_tokens = walk.scheduler.num_hit_tokens
    assert num_hit_tokens >= 16
    assert walk.scheduler.recompute(sequence)
    walk.send()
    (added,) = walk.in_flight[-1][0].add
    assert added.sequence is sequence
    assert added.num_cached_tokens == 0
    walk.run_dry()
    walk.check_answers()
    other = walk.add((*prompt, 3), 4, 4)
    assert not walk.scheduler.recompute(sequence)  # once; and what it shared meanwhile is distrusted again
    walk.send()
    assert walk.in_flight[-1][0].add[0].num_cached_tokens == 0
    walk.run_dry()
    assert other.sequence_id in walk.finished
    walk.check_answers()


def test_states_that_no_sequence_outgrows_are_all_used_at_once() -> None:
    """One block a sequence, however long: nothing is kept back for growing, and nobody is preempted."""
    limits = Limits(max_step_tokens=20, max_sequences=8)
    walk = Walk(num_blocks=4, block_size=30, limits=limits, share_prefixes=False)
    for number in range(6):
        walk.add(tuple(range(number, number + 10)), max_new_tokens=20, ends_after=20)
    most_running = 0
    while walk.alive:
        walk.send()
        most_running = max(most_running, len(walk.scheduler.running))
        walk.receive()
        walk.check()
    walk.run_dry()
    assert most_running == 4
    assert walk.scheduler.num_preemptions == 0
    walk.check_answers()


def test_an_encoders_prompt_is_not_cut() -> None:
    """Who does not fit beside the others waits, also when an answer was interrupted."""
    limits = Limits(max_step_tokens=40, max_sequences=4)
    scheduler = Scheduler(limits, BlockAllocator(64, 8, share_prefixes=False))
    first, second = (
        Sequence.of(
            number,
            Request("r", "", tuple(range(length)), Sampling(), 60, continues_prompt=False),
            Collector(60),
            (9,),
        )
        for number, length in ((1, 30), (2, 20))
    )
    assert (first.num_prompt_tokens, list(first.token_ids[-2:])) == (31, [29, 9])
    scheduler.add(first)
    scheduler.add(second)

    def run() -> dict[int, int]:
        plan = scheduler.plan()
        assert plan is not None
        tokens = {row.sequence.sequence_id: SampledToken(5, 0.0) for row in plan.rows if row.samples}
        scheduler.confirm(plan, StepResult(plan.step_id, tokens))
        return {row.sequence.sequence_id: row.num_tokens for row in plan.rows}

    assert run() == {1: 31}
    assert run() == {1: 1, 2: 21}
    for _ in range(12):
        assert run() == {1: 1, 2: 1}
    scheduler.restart(BlockAllocator(64, 8, share_prefixes=False))
    assert run() == {1: 40}  # the whole prompt, and what fits of the answer
    assert run() == {1: 5, 2: 34}
    assert run() == {1: 1, 2: 1}
    while scheduler.prompt_budget.halve():  # memory ran out, again and again
        pass
    scheduler.restart(BlockAllocator(64, 8, share_prefixes=False))
    assert run() == {1: 31}
    assert run() == {1: 16}
    assert run() == {1: 1, 2: 21}
