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
from tgi_launcher.stalls import Silence, pause_after, until_one_ends

POLL_S = 0.025  # a router killed right after its first answer has served: notice the answer soon
CONNECT_TIMEOUT_S = 1.0
HEALTH_REQUEST = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"


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
        """Returns when it has ended. One that hangs is made to end."""
        assert self._child is not None
        await until_one_ends([self._child.ended], self._kill_when_stalled(self._child))
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

    async def _kill_when_stalled(self, child: Child) -> None:
        """Returns when it hung and has been killed; at once if the port is not ours alone to ask."""
        silence = Silence(self._plan.options.stall_timeout)
        while not self._port_was_taken:
            asked_at = time.monotonic()
            has_answered = await self._answers_http(silence.answer_timeout_s)
            if (reason := silence.note(has_answered, time.monotonic())) is not None:
                self._log.error(f"Webserver stalled: {reason}")
                child.kill()
                return
            await pause_after(asked_at)

    async def _answers_http(self, timeout_s: float) -> bool:
        """Whether GET /health is answered, with whatever status."""
        address = _reachable(self._plan.options.hostname), self._plan.port
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_connection(*address)
                try:
                    writer.write(HEALTH_REQUEST)
                    return (await reader.read()).startswith(b"HTTP/")
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return False

    async def _answers(self) -> bool:
        """Whether the process that runs now accepts connections."""
        if self._child is None or not self._child.is_alive or self._port_was_taken:
            return False
        return await self._port_answers()

    async def _port_answers(self) -> bool:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, writer = await asyncio.open_connection(
                    _reachable(self._plan.options.hostname), self._plan.port
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
