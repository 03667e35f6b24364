"""Short schedules of faults, hundreds of them; `make simulate` runs twenty thousand."""

import gc
from collections.abc import Iterable

import pytest
from simulate import simulate
from simulator import Simulation, Violation

from tgi_router.permits import Permits
from tgi_router.scheduling.blame import Blame
from tgi_router.scheduling.block_allocator import BlockAllocator
from tgi_router.scheduling.scheduler import Scheduler
from tgi_router.scheduling.sequence import Sequence
from tgi_router.scheduling.step_loop import StepLoop

NUM_SCHEDULES = 600


def test_no_schedule_breaks_a_promise() -> None:
    total = simulate(range(NUM_SCHEDULES))
    # The schedules are worth something: all of this has happened, and often.
    assert total["answered"] > NUM_SCHEDULES
    few = ("aborted", "overloaded", "queued_too_long", "failed", "poisoned")
    assert min(total[name] for name in few) > NUM_SCHEDULES // 50


def test_a_schedule_replays_exactly() -> None:
    for seed in range(20):
        assert Simulation(seed).run() == Simulation(seed).run()


def test_nothing_of_a_schedule_stays_in_memory() -> None:
    simulate(range(50))
    gc.collect()
    # By `type`: `isinstance` asks a stranger's `__class__`, and some of torch's warn at that.
    assert not [found for found in gc.get_objects() if type(found) is StepLoop]


def test_it_finds_a_double_free(monkeypatch: pytest.MonkeyPatch) -> None:
    release = BlockAllocator.release

    def release_twice(self: BlockAllocator, block_ids: list[int]) -> None:
        release(self, block_ids)
        if len(block_ids) > 3:
            release(self, block_ids[:1])

    monkeypatch.setattr(BlockAllocator, "release", release_twice)
    with pytest.raises(Violation):
        simulate(range(NUM_SCHEDULES))


def test_it_finds_a_lost_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    restart = Scheduler.restart

    def forget_one(self: Scheduler, allocator: BlockAllocator) -> None:
        if len(self.running) > 1:
            self.running.popitem()
        restart(self, allocator)

    monkeypatch.setattr(Scheduler, "restart", forget_one)
    with pytest.raises(Violation):
        simulate(range(NUM_SCHEDULES))


def test_it_finds_blame_on_an_innocent(monkeypatch: pytest.MonkeyPatch) -> None:
    def blame_the_first(self: Blame, in_flight: Iterable[Sequence], **_: object) -> Sequence | None:
        return next(iter(in_flight), None)

    monkeypatch.setattr(Blame, "lost", blame_the_first)
    with pytest.raises(Violation):
        simulate(range(NUM_SCHEDULES))


def test_it_finds_a_permit_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    give_back = Permits.give_back
    monkeypatch.setattr(Permits, "give_back", lambda self, count: give_back(self, min(count, 1)))
    with pytest.raises(Violation):
        simulate(range(NUM_SCHEDULES))
