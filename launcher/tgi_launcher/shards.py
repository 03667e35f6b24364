"""The shards: started, watched and ended as one group, since none of them is of use without the others."""

import asyncio
import functools
import time
from pathlib import Path

from tgi_launcher.errors import LauncherError, ShardCannotStart, ShardFailed
from tgi_launcher.logs import Log, Span, parse_child_line, relay
from tgi_launcher.plan import Plan, shard_command, standby_command, turn
from tgi_launcher.processes import Child, Family, NotInPath
from tgi_launcher.rendezvous import Venue, is_socket
from tgi_launcher.shard_health import ShardHealth
from tgi_launcher.stalls import ShardWatch, pause_after, until_one_ends
from tgi_launcher.standbys import Standbys

POLL_S = 0.02  # streams may be standing still
STILL_WAITING_S = 10.0


class Shards:
    title = "the shards"
    failure: type[LauncherError] = ShardFailed

    def __init__(self, plan: Plan, model_path: Path, venue: Venue, family: Family, log: Log) -> None:
        self._plan = plan
        self._model_path = model_path
        self._venue = venue
        self._family = family
        self._log = log
        self._children: list[Child] = []  # by rank
        may_need_them = plan.options.standby_shards and plan.options.max_restarts > 0
        self._standbys = Standbys(plan.num_shard if may_need_them else 0, self._start_standby, log)
        self.are_up = asyncio.Event()

    async def start(self) -> None:
        """Returns when every rank has its socket. Raises ShardCannotStart, with no rank left running."""
        try:
            self._spawn()
            await self._until_ready()
        except ShardCannotStart:
            await self._kill()
            raise
        self.are_up.set()

    async def lost(self) -> None:
        """Returns when a rank has ended and the others, useless now, have been killed.

        A rank that hangs is made to end. Meanwhile the standby processes are started.
        """
        async with self._standbys.kept() as has_settled:
            await until_one_ends(
                [child.ended for child in self._children], self._kill_the_stalled(has_settled)
            )
        self.are_up.clear()
        for rank, child in enumerate(self._children):
            if not child.is_alive:
                self._report(rank, child)
                self._log.error(f"Shard {rank} crashed", _span(rank))
        await self._kill()

    async def end(self) -> None:
        self._log.info("Shutting down shards")
        await self._standbys.end()
        timeout_s = self._plan.options.graceful_termination_timeout
        await asyncio.gather(
            *(child.end(timeout_s, self._log, _span(rank)) for rank, child in enumerate(self._children))
        )

    def _spawn(self) -> None:
        rendezvous = self._venue.rendezvous()
        self._children = []
        for rank in range(self._plan.num_shard):
            span = _span(rank)
            if (child := self._standbys.take(rank, turn(rendezvous))) is not None:
                self._log.info("Starting shard in the process that stood by", span)
                self._children.append(child)
                continue
            self._log.info("Starting shard", span)
            command = shard_command(self._plan, self._model_path, rank, rendezvous)
            try:
                child = self._family.start("shard", command, functools.partial(self._relay, span))
            except NotInPath as error:
                self._log.error(str(error), span)
                self._log.error("Please install it with `make install-server`", span)
                raise ShardCannotStart from error
            except OSError as error:
                self._log.error(f"Shard {rank} failed to start: {error}", span)
                raise ShardCannotStart from error
            self._children.append(child)

    def _start_standby(self, rank: int) -> Child:
        """Raises NotInPath, OSError."""
        command = standby_command(self._plan, self._model_path, rank, self._venue.uds_path)
        return self._family.start("shard", command, functools.partial(self._relay, _span(rank)), listens=True)

    async def _until_ready(self) -> None:
        """A rank is ready when its socket is there. Raises ShardCannotStart when one ends before all are."""
        started = time.monotonic()
        next_notice = started + STILL_WAITING_S
        waiting = dict(enumerate(self._venue.socket_paths()))
        while True:
            for rank, child in enumerate(self._children):
                if not child.is_alive:
                    self._report(rank, child)
                    self._log.error(f"Shard {rank} failed to start", _span(rank))
                    raise ShardCannotStart
            now = time.monotonic()
            for rank in [rank for rank, path in waiting.items() if is_socket(path)]:
                del waiting[rank]
                self._log.info(f"Shard ready in {now - started:.3f}s", _span(rank))
            if not waiting:
                return
            if now >= next_notice:
                next_notice = now + STILL_WAITING_S
                for rank in waiting:
                    self._log.info("Waiting for shard to be ready...", _span(rank))
            await asyncio.sleep(POLL_S)

    async def _kill_the_stalled(self, has_settled: asyncio.Event) -> None:
        """Returns when a rank that hangs, or several, have been killed.

        Sets `has_settled` when all have run a step that was asked for, which those of the warm-up are not.
        """
        channels = [ShardHealth(path) for path in self._venue.socket_paths()]
        watches = [ShardWatch(self._plan.options.stall_timeout) for _ in channels]
        try:
            while True:
                asked_at = time.monotonic()
                answers = await asyncio.gather(
                    *(
                        channel.ask(watch.answer_timeout_s)
                        for channel, watch in zip(channels, watches, strict=True)
                    )
                )
                now = time.monotonic()
                if all(health is not None and health.last_step_id > 0 for health in answers):
                    has_settled.set()
                stalled = False
                for rank, (watch, health) in enumerate(zip(watches, answers, strict=True)):
                    if (reason := watch.note(health, now)) is not None and self._children[rank].is_alive:
                        self._log.error(f"Shard {rank} stalled: {reason}", _span(rank))
                        self._children[rank].kill()
                        stalled = True
                if stalled:
                    return
                await pause_after(asked_at)
        finally:
            await asyncio.gather(*(channel.close() for channel in channels))

    async def _kill(self) -> None:
        for child in self._children:
            child.kill()
        for child in self._children:
            await child.wait()

    def _report(self, rank: int, child: Child) -> None:
        self._log.error(f"Shard complete standard error output:\n{child.stderr.text()}", _span(rank))
        code = child.ended.result()
        if code < 0:
            self._log.error(f"Shard process was signaled to shutdown with signal {-code}", _span(rank))

    def _relay(self, span: Span, line: bytes) -> None:
        relay(self._log, line, parse_child_line(line), span)


def _span(rank: int) -> Span:
    return Span("shard-manager", {"rank": rank})
