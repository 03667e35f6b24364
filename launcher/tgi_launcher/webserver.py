"""The router: started when the shards are up, ready when its port answers."""

import asyncio
import ipaddress
import sys
import time
from pathlib import Path

from tgi_launcher.errors import LauncherError, WebserverCannotStart, WebserverFailed
from tgi_launcher.logs import Log
from tgi_launcher.plan import Plan, router_command
from tgi_launcher.processes import Child, Family, NotInPath
from tgi_launcher.restarts import HEALTHY_S
from tgi_launcher.shards import Shards

POLL_S = 0.025  # a router killed right after its first answer has served: notice the answer soon
CONNECT_TIMEOUT_S = 1.0


class Webserver:
    title = "the webserver"
    failure: type[LauncherError] = WebserverFailed

    def __init__(
        self, plan: Plan, model_path: Path, shard_socket: Path, family: Family, log: Log, shards: Shards
    ) -> None:
        self._plan = plan
        self._command = router_command(plan, model_path, shard_socket)
        self._family = family
        self._log = log
        self._shards = shards
        self._child: Child | None = None
        self._port_was_taken = False
        self._has_served = False

    async def start(self) -> None:
        """Returns when it answers. Raises WebserverCannotStart, or WebserverFailed if it ends before."""
        await self._shards.are_up.wait()
        # If somebody answers there already, an answer says nothing about our router.
        self._port_was_taken = await self._port_answers()
        self._log.info("Starting Webserver")
        child = self._child = self._spawn()
        started = time.monotonic()
        while child.is_alive:
            served_s = time.monotonic() - started
            if await self._answers() or (self._port_was_taken and served_s >= HEALTHY_S):
                self._has_served = True
                self._log.info(f"Webserver ready in {served_s:.3f}s")
                return
            await asyncio.sleep(POLL_S)
        self._report(child)
        raise WebserverFailed

    async def lost(self) -> None:
        assert self._child is not None
        await self._child.wait()
        self._report(self._child)

    async def has_served(self) -> bool:
        """Whether it has answered at least once, in this process or in one before."""
        self._has_served = self._has_served or await self._answers()
        return self._has_served

    async def end(self) -> None:
        if self._child is not None:
            await self._child.end(self._plan.options.graceful_termination_timeout, self._log)

    def _spawn(self) -> Child:
        try:
            return self._family.start("webserver", self._command, self._log.raw, _to_stderr)
        except NotInPath as error:
            self._log.error(str(error))
            self._log.error("Please install it with `make install-router`")
            raise WebserverCannotStart from error
        except OSError as error:
            self._log.error(f"Failed to start webserver: {error}")
            raise WebserverCannotStart from error

    def _report(self, child: Child) -> None:
        self._log.error("Webserver Crashed")
        code = child.ended.result()
        if code < 0:
            self._log.error(f"Webserver process was signaled to shutdown with signal {-code}")

    async def _answers(self) -> bool:
        """Whether the process that runs now accepts connections."""
        if self._child is None or not self._child.is_alive or self._port_was_taken:
            return False
        return await self._port_answers()

    async def _port_answers(self) -> bool:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, writer = await asyncio.open_connection(
                    _reachable(self._plan.options.hostname), self._plan.options.port
                )
                # Where nobody listens, a connection may start at that very port by chance, and reach itself.
                is_loop = writer.get_extra_info("sockname") == writer.get_extra_info("peername")
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError):
            return False
        return not is_loop


def _reachable(hostname: str) -> str:
    """An address at which a listener on `hostname` answers this machine."""
    try:
        address = ipaddress.ip_address(hostname)
    except ValueError:
        return "127.0.0.1"  # the router listens on 0.0.0.0 then
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "::1"
    return str(address)


def _to_stderr(line: bytes) -> None:
    print(line.decode(errors="replace"), file=sys.stderr, flush=True)
