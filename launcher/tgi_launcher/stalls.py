"""When a process that still runs is taken for hung: it says nothing for too long, or its step takes too long.

Time counts only while we ask: after a pause of the whole machine or container nobody is blamed for it, and a
step must look too old twice in a row. The first steps are not suspicious for being slow: the shards' longest
step, by which a step is judged, includes those of the warm-up.
"""

import asyncio
import time
from collections.abc import Collection, Coroutine
from dataclasses import dataclass

ASK_EVERY_S = 1.0
MAX_ANSWER_S = 5.0  # for one answer; somebody who is only slow to answer is not silent
STALL_FACTOR = 10  # a step that takes so many times the longest one so far hangs


@dataclass(frozen=True, slots=True)
class Health:
    """What a shard says of itself."""

    last_step_id: int
    current_step_age_s: float  # 0: no step is under way
    longest_step_s: float


class Silence:
    """For how long somebody has not answered."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.answer_timeout_s = min(MAX_ANSWER_S, timeout_s)
        self._asked_at = time.monotonic()
        self._silent_s = 0.0

    def note(self, has_answered: bool, now: float) -> str | None:
        """After every question. The reason, if it has been silent for too long."""
        since_last_s, self._asked_at = now - self._asked_at, now
        counted_s = min(since_last_s, ASK_EVERY_S + self.answer_timeout_s)
        self._silent_s = 0.0 if has_answered else self._silent_s + counted_s
        return f"no answer for {self._silent_s:.1f}s" if self._silent_s >= self.timeout_s else None


class ShardWatch:
    """Judges one shard by its answers."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._silence = Silence(timeout_s)
        self._overdue_after: int | None = None  # the step id before the one that looked too old
        self.answer_timeout_s = self._silence.answer_timeout_s

    def note(self, health: Health | None, now: float) -> str | None:
        """After every question; None: no answer. The reason, if the shard hangs."""
        if (reason := self._silence.note(health is not None, now)) is not None or health is None:
            return reason
        limit_s = max(self._timeout_s, STALL_FACTOR * health.longest_step_s)
        if health.current_step_age_s <= limit_s:
            self._overdue_after = None
            return None
        if self._overdue_after != health.last_step_id:
            self._overdue_after = health.last_step_id
            return None
        return f"its step takes {health.current_step_age_s:.1f}s, the limit is {limit_s:.1f}s"


async def until_one_ends(ended: Collection[asyncio.Task[int]], watching: Coroutine[None, None, None]) -> None:
    """Until one of the processes has ended. Meanwhile `watching` asks them, and kills what hangs."""
    watch = asyncio.create_task(watching)
    try:
        await asyncio.wait([*ended, watch], return_when=asyncio.FIRST_COMPLETED)
        if watch.done():
            watch.result()
            await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)


async def pause_after(asked_at: float) -> None:
    """Until it is time for the next question."""
    await asyncio.sleep(max(0.0, asked_at + ASK_EVERY_S - time.monotonic()))
