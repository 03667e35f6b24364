"""Runs a plan: download, shards, router, in this order; keeps the last two alive; ends them in reverse.

Whoever starts processes also ends them when it is cancelled, so a stop at any moment is one cancellation: the
router is asked first and drains, then all shards at once. A second signal kills everything, and those waits
are over.

Until the router has served for the first time nothing is started twice: what fails then (a model that
does not fit, a port that is taken) would fail again.
"""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Protocol

from tgi_launcher.download import download
from tgi_launcher.errors import LauncherError
from tgi_launcher.logs import Log
from tgi_launcher.plan import Plan
from tgi_launcher.processes import Family
from tgi_launcher.rendezvous import Venue
from tgi_launcher.restarts import Restarts
from tgi_launcher.shards import Shards
from tgi_launcher.webserver import Webserver


async def run(plan: Plan, known_folder: Path | None, log: Log) -> None:
    """Serve until asked to stop. `known_folder`: nothing to download. Raises LauncherError."""
    with Family() as family, Venue(plan.options, plan.num_shard) as venue:
        for path in venue.paths():
            family.remove_at_exit(path)
        await _until_stopped(_serve(plan, known_folder, venue, family, log), family)


async def _until_stopped(serving: Coroutine[None, None, None], family: Family) -> None:
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            family.kill_all()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup means it
            loop.add_signal_handler(number, on_signal)
    work = asyncio.create_task(serving)
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([work, stopped], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not work.done():
        work.cancel()
        await asyncio.wait([work])
    if not work.cancelled():
        work.result()


async def _serve(plan: Plan, known_folder: Path | None, venue: Venue, family: Family, log: Log) -> None:
    folder = known_folder or await download(plan, family, log)
    shards = Shards(plan, folder, venue, family, log)
    webserver = Webserver(plan, folder, venue.socket_paths()[0], family, log, shards)
    try:
        await shards.start()
        try:
            await _keep_both(shards, webserver, plan.options.max_restarts, log)
        finally:
            await webserver.end()
    finally:
        await shards.end()


async def _keep_both(shards: Shards, webserver: Webserver, max_restarts: int, log: Log) -> None:
    """Starts the router. Never returns; raises when one of the two cannot be kept alive."""

    async def keep_webserver() -> None:
        await webserver.start()
        await _keep(webserver, Restarts(max_restarts), webserver.has_served, log)

    keepers = [
        asyncio.create_task(_keep(shards, Restarts(max_restarts), webserver.has_served, log)),
        asyncio.create_task(keep_webserver()),
    ]
    try:
        done, _ = await asyncio.wait(keepers, return_when=asyncio.FIRST_COMPLETED)
        for keeper in done:
            keeper.result()
    finally:
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)


class Part(Protocol):
    """What is kept alive: the shards as one, or the router."""

    title: str
    failure: type[LauncherError]

    async def start(
        self,
    ) -> None: ...  # returns when it is ready; LauncherError, with nothing left of it, if it will not be
    async def lost(self) -> None: ...  # returns when it has died, all of it


async def _keep(part: Part, restarts: Restarts, may_restart: Callable[[], Awaitable[bool]], log: Log) -> None:
    """Restart `part`, which is ready now, whenever it dies. Never returns; raises its failure at the end."""
    while True:
        ready_at = time.monotonic()
        await part.lost()
        served_s = time.monotonic() - ready_at
        if not await may_restart():
            raise part.failure
        await _restart(part, restarts, served_s, log)


async def _restart(part: Part, restarts: Restarts, served_s: float, log: Log) -> None:
    while True:
        delay_s = restarts.delay_s(served_s)
        if delay_s is None:
            log.error(f"Giving up on {part.title} after {restarts.max_restarts} restarts in a row")
            raise part.failure
        when = f"in {delay_s}s" if delay_s else "at once"
        log.warn(
            f"Restarting {part.title} {when} ({restarts.num_failures} of {restarts.max_restarts} in a row)"
        )
        await asyncio.sleep(delay_s)
        try:
            await part.start()
        except LauncherError:  # the part has logged why
            served_s = 0.0
        else:
            return
