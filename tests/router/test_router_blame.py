"""Who loses the shards is found and failed; who was only there is not."""

import random

import pytest

from scripted_shard import next_token
from tgi_router.request import FinishReason, Request, SampledToken, Sampling
from tgi_router.scheduling.blame import Blame
from tgi_router.scheduling.block_allocator import BlockAllocator
from tgi_router.scheduling.plan import StepPlan, StepResult
from tgi_router.scheduling.scheduler import Limits, Scheduler
from tgi_router.scheduling.sequence import Sequence


class Silent:
    def on_scheduled(self) -> None:
        pass

    def on_prompt_logprobs(self, start_position: int, logprobs: list[float]) -> None:
        pass

    def on_token(self, token: SampledToken) -> FinishReason | None:
        return None

    def on_error(self, error: Exception) -> None:
        raise AssertionError(error)


def sequences(count: int) -> list[Sequence]:
    requests = [Request("r", "", (number, 1, 2), Sampling(), 20) for number in range(count)]
    return [Sequence.of(number, request, Silent()) for number, request in enumerate(requests, 1)]


def lose(blame: Blame, *in_flight: Sequence, over: frozenset[Sequence] = frozenset()) -> Sequence | None:
    return blame.lost(in_flight, is_alive=lambda sequence: sequence not in over)


def test_one_loss_blames_nobody() -> None:
    blame, (first, second) = Blame(), sequences(2)
    assert lose(blame, first, second) is None
    assert blame.prime_suspect is None


def test_the_same_suspects_twice_are_tried_one_by_one() -> None:
    blame, (first, second, other) = Blame(), sequences(3)
    lose(blame, first, second)
    assert lose(blame, first, second, other) is None
    assert blame.quarantined == [first, second]  # the other one has seen one loss alone
    assert blame.prime_suspect is first
    for _ in range(2):
        blame.stepped(first)
        assert blame.prime_suspect is first  # not past the place yet
        first.token_ids.append(7)
    blame.stepped(first)
    assert blame.prime_suspect is second
    assert lose(blame, second) is None
    assert lose(blame, second) is second


def test_progress_between_losses_clears() -> None:
    """A long stream outlives any number of kills from outside."""
    blame, (only,) = Blame(), sequences(1)
    for _ in range(50):
        assert lose(blame, only) is None
        assert blame.prime_suspect is None
        only.token_ids.extend((7, 7))
        blame.stepped(only)


def test_who_is_over_is_no_suspect_but_was_company() -> None:
    blame, (first, second) = Blame(), sequences(2)
    for _ in range(5):
        assert lose(blame, first, second, over=frozenset({second})) is None
    assert blame.quarantined == [first]
    blame.forget(first)
    assert blame.prime_suspect is None


@pytest.mark.parametrize("seed", range(20))
def test_the_guilty_ones_fail_and_the_others_end(seed: int) -> None:
    """Schedulers that lose their shards whenever a guilty sequence is computed."""
    rng = random.Random(seed)
    scheduler = Scheduler(Limits(max_step_tokens=16, max_sequences=8), BlockAllocator(40, 4))
    alive = sequences(12)
    guilty = set(rng.sample(alive, rng.randrange(1, 4)))
    failed, ended, num_losses = set(), set(), 0
    for sequence in alive:
        scheduler.add(sequence)
    in_flight: list[StepPlan] = []
    while len(failed | ended) < len(alive):
        while len(in_flight) < 2 and (plan := scheduler.plan()) is not None:
            suspects_before = scheduler.blame.quarantined
            in_flight.append(plan)
            if suspects_before:
                assert len({row.sequence for plan in in_flight for row in plan.rows}) <= 1
        if any(row.sequence in guilty for row in in_flight[0].rows):
            num_losses += 1
            rows = [row.sequence for plan in in_flight for row in plan.rows]
            blamed = scheduler.blame.lost(rows, lambda sequence: sequence not in failed | ended)
            if blamed is not None:
                failed.add(blamed)
                scheduler.remove(blamed)
            in_flight.clear()
            scheduler.restart(BlockAllocator(40, 4))
            continue
        plan = in_flight.pop(0)
        tokens = {
            row.sequence.sequence_id: SampledToken(next_token(list(row.sequence.token_ids), 50), 0.0)
            for row in plan.rows
            if row.samples
        }
        for sequence, _ in scheduler.confirm(plan, StepResult(plan.step_id, tokens)):
            if len(sequence.token_ids) - sequence.num_prompt_tokens == sequence.request.max_new_tokens:
                scheduler.remove(sequence)
                ended.add(sequence)
    assert failed == guilty
    assert num_losses <= 4 * len(guilty)
    assert scheduler.allocator.num_held == 0
