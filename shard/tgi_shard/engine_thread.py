"""The one thread that touches the device: it runs plans and other work in the order in which they came.

Plans wait in its queue, so the next one is at hand when a step ends. On an accelerator a step is launched
before its predecessor is finished, so the device has work while the host reads results; without a next plan,
or on a CPU, a step is finished at once.

A step that awaits masks runs its forward pass, then finishes its predecessor, whose result moves the grammars
on, and only then waits: the router's answer comes while the device computes.
"""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import TypeVar

from tgi_shard.engine import Engine, PendingResult
from tgi_shard.plan import Masks, StepPlan, StepResult

MASKS_TIMEOUT_S = 60.0  # from the moment that everything else is there

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class AwaitedMasks:
    """What a step waits for. None: given up, nobody will read the step's result."""

    future: "Future[Masks | None]"
    on_timeout: Callable[[str], None]  # called in the engine's thread, with the reason


@dataclass(frozen=True, slots=True)
class _Step:
    engine: Engine
    plan: StepPlan
    deliver: Callable[[StepResult], None]
    masks: AwaitedMasks | None


@dataclass(frozen=True, slots=True)
class _Launched:
    step: _Step
    pending: PendingResult
    began_at: float  # time.monotonic()


class EngineThread:
    """`on_failure` is called, in this thread, with what a plan raised. Set it before the first plan.

    It tells whether the thread goes on. If so, plans whose results would go where the failed one's would
    have gone are passed over: they count on what the failed one should have done.
    """

    on_failure: Callable[[Exception], bool]

    def __init__(self) -> None:
        self.last_step_id = 0
        self.last_step_ended_at: float | None = None  # time.monotonic(), like the next
        self.step_began_at: float | None = None  # None: no step is under way
        self.longest_step_s = 0.0  # so far, the warm-up's steps among them
        self.num_failures_in_a_row = 0  # steps that raised, with none between them that went well
        self._latest: Callable[[StepResult], None] | None = None  # where the latest step's result goes
        self._given_up: Callable[[StepResult], None] | None = None  # where no result goes any more
        self._queue: queue.SimpleQueue[_Step | Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Let it end what it has begun. False if that took longer than `timeout_s`."""
        self._queue.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def run_plan(
        self,
        engine: Engine,
        plan: StepPlan,
        deliver: Callable[[StepResult], None],
        masks: AwaitedMasks | None = None,
    ) -> None:
        """Queue a step; `deliver` gets its result, in this thread. masks: None if it waits for none."""
        self._queue.put(_Step(engine, plan, deliver, masks))

    def note_step(self, seconds: float) -> None:
        """Of a step that took so long; called in this thread."""
        self.longest_step_s = max(self.longest_step_s, seconds)

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Queue anything else."""
        future: Future[T] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:  # it belongs to the caller
                future.set_exception(error)

        self._queue.put(work)
        return future

    def _run(self) -> None:
        while True:
            try:
                self._loop()
                return
            except Exception as error:
                self.num_failures_in_a_row += 1
                if not self.on_failure(error):
                    return
            self._given_up = self._latest
            self.last_step_ended_at, self.step_began_at = time.monotonic(), None

    def _loop(self) -> None:
        launched: _Launched | None = None
        while True:
            try:
                work = self._queue.get(block=launched is None)
            except queue.Empty:
                self._finish(launched)
                launched = None
                continue
            if isinstance(work, _Step):
                if work.deliver is self._given_up:
                    continue
                self._latest = work.deliver
                began_at = self.step_began_at = time.monotonic()
                forwarded = work.engine.forward(work.plan)
                masks = None
                if work.masks is not None:
                    self._finish(launched, is_followed=True)
                    launched = None
                    masks = _wait(work.masks, work.plan.step_id)
                pending = work.engine.sample(forwarded, masks)
                previous, launched = launched, _Launched(work, pending, began_at)
                self._finish(previous, is_followed=True)
                if work.engine.slots.device.type == "cpu":
                    self._finish(launched)
                    launched = None
                continue
            self._finish(launched)
            launched = None
            if work is None:
                return
            work()

    def _finish(self, launched: _Launched | None, *, is_followed: bool = False) -> None:
        """is_followed: another step has been launched, and begins on the device when this one ends."""
        if launched is not None:
            result = launched.step.engine.finish(launched.pending)
            now = time.monotonic()
            self.note_step(now - max(launched.began_at, self.last_step_ended_at or 0.0))
            self.last_step_id = result.step_id
            self.num_failures_in_a_row = 0
            self.last_step_ended_at = now
            self.step_began_at = now if is_followed else None
            launched.step.deliver(result)


def _wait(awaited: AwaitedMasks, step_id: int) -> Masks | None:
    """None: given up. The step is completed all the same, because the other ranks are in the middle of it."""
    try:
        return awaited.future.result(MASKS_TIMEOUT_S)
    except FutureTimeout:
        awaited.on_timeout(f"the masks of step {step_id} did not come within {MASKS_TIMEOUT_S:g} s")
        return None
