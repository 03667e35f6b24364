"""The one thread that touches the device: it runs plans and other work in the order in which they came.

Plans wait in its queue, so the next one is at hand when a step ends. On an accelerator a step is launched
before its predecessor is finished, so the device has work while the host reads results; without a next plan,
or on a CPU, a step is finished at once.
"""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from tgi_shard.engine import Engine, PendingResult
from tgi_shard.plan import StepPlan, StepResult

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Step:
    engine: Engine
    plan: StepPlan
    deliver: Callable[[StepResult], None]


@dataclass(frozen=True, slots=True)
class _Launched:
    step: _Step
    pending: PendingResult


class EngineThread:
    """`on_failure` is called, in this thread, with what a plan raised; nothing runs after that.

    Set it before the first plan.
    """

    on_failure: Callable[[Exception], None]

    def __init__(self) -> None:
        self.last_step_id = 0
        self.last_step_ended_at: float | None = None  # time.monotonic(), like the next
        self.step_began_at: float | None = None  # None: no step is under way
        self._queue: queue.SimpleQueue[_Step | Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Let it end what it has begun. False if that took longer than `timeout_s`."""
        self._queue.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def run_plan(self, engine: Engine, plan: StepPlan, deliver: Callable[[StepResult], None]) -> None:
        """Queue a step; `deliver` gets its result, in this thread."""
        self._queue.put(_Step(engine, plan, deliver))

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
        try:
            self._loop()
        except Exception as error:
            self.on_failure(error)

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
                self.step_began_at = time.monotonic()
                previous, launched = launched, _Launched(work, work.engine.step(work.plan))
                self._finish(previous)
                if work.engine.slots.device.type == "cpu":
                    self._finish(launched)
                    launched = None
                continue
            self._finish(launched)
            launched = None
            if work is None:
                return
            work()

    def _finish(self, launched: _Launched | None) -> None:
        if launched is not None:
            result = launched.step.engine.finish(launched.pending)
            self.last_step_id = result.step_id
            self.last_step_ended_at = time.monotonic()
            self.step_began_at = None
            launched.step.deliver(result)
