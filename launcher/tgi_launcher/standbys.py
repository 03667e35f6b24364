"""Processes that stand by, one a rank: ready to become that shard at once when the group is lost.

Imports are most of the start of a small shard. A standby process has done them, and waits; it has no weights,
no device and no socket. It is started like a shard, so it dies with the launcher in the same ways, and is an
ordinary shard once it has been told to go on.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from tgi_launcher.logs import Log, Span
from tgi_launcher.processes import Child, NotInPath

SETTLE_S = 5.0
CHECK_EVERY_S = 60.0  # those that died while they waited are replaced, but not again and again


class Standbys:
    def __init__(self, num_ranks: int, start: Callable[[int], Child], log: Log) -> None:
        """num_ranks: 0 for none. start(rank) raises NotInPath, OSError."""
        self._num_ranks = num_ranks
        self._start = start
        self._log = log
        self._waiting: dict[int, Child] = {}  # by rank

    def take(self, rank: int, turn: bytes) -> Child | None:
        """Tell the process that waits (or still imports) to go on as that rank. None: there is none."""
        child = self._waiting.pop(rank, None)
        return child if child is not None and child.tell(turn) else None

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncIterator[asyncio.Event]:
        """While the group runs, see to it that there is one for each rank.

        They are not started before the group has settled, since a recovery needs the machine for itself:
        whoever sees that sets the event; else it is taken to be so after a while.
        """
        has_settled = asyncio.Event()
        keeping = asyncio.create_task(self._keep(has_settled))
        try:
            yield has_settled
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    async def end(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for child in waiting.values():
            child.kill()
        for child in waiting.values():
            await child.wait()

    async def _keep(self, has_settled: asyncio.Event) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(has_settled.wait(), SETTLE_S)
        while True:
            for rank in range(self._num_ranks):
                self._see_to(rank)
            await asyncio.sleep(CHECK_EVERY_S)

    def _see_to(self, rank: int) -> None:
        span = Span("shard-manager", {"rank": rank})
        if (child := self._waiting.get(rank)) is not None:
            if child.is_alive:
                return
            del self._waiting[rank]
            self._log.warn(f"The process that stood by has ended with code {child.ended.result()}", span)
            if stderr := child.stderr.text():
                self._log.warn(f"Its standard error output:\n{stderr}", span)
        try:
            self._waiting[rank] = self._start(rank)
        except (NotInPath, OSError) as error:
            self._log.warn(f"No process can stand by: {error}", span)
