"""Child processes: each in a group of its own, never left behind, its output read line by line."""

import asyncio
import contextlib
import ctypes
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Self

from tgi_launcher import sentinel
from tgi_launcher.logs import Lines, Log, Span, Tail
from tgi_launcher.plan import Command

POLL_S = 0.05
DRAIN_S = 1.0  # how long output may still come once the process and its group are dead
READ_BYTES = 1 << 16
PR_SET_PDEATHSIG = 1

_prctl = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None


class NotInPath(Exception):
    """No such executable, neither beside the Python that runs us nor in PATH."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} not found in PATH")


def find_executable(name: str) -> str:
    """The one beside our Python first: a virtual environment need not be activated. Raises NotInPath."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which(name)
    if found is None:
        raise NotInPath(name)
    return found


def _die_with_parent(parent_pid: int) -> None:
    """Runs in the child before exec: SIGKILL when the launcher dies. Without prctl the sentinel has to do."""
    if _prctl is None:
        return
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)


class Family:
    """All living children of the launcher, and the sentinel that knows of them."""

    def __init__(self) -> None:
        self._living: set[Child] = set()
        self._sentinel = subprocess.Popen(
            [sys.executable, "-I", "-S", sentinel.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C in the terminal is not for it
        )

    def start(
        self,
        name: str,
        command: Command,
        on_line: Callable[[bytes], None],
        on_error_line: Callable[[bytes], None] | None = None,
        *,
        listens: bool = False,
    ) -> "Child":
        """listens: it reads its stdin, see `Child.tell`.

        Raises NotInPath, OSError. For the main thread only: its end is what the death signal follows.
        """
        process = subprocess.Popen(
            [find_executable(command.argv[0]), *command.argv[1:]],
            env=command.environ,
            stdin=subprocess.PIPE if listens else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,
            preexec_fn=functools.partial(_die_with_parent, os.getpid()),
        )
        child = Child(name, process, on_line, on_error_line, self._forget)
        self._living.add(child)
        self._tell("watch", process.pid)
        return child

    def remove_at_exit(self, path: Path) -> None:
        self._tell("remove", str(path))

    def kill_all(self) -> None:
        for child in self._living:
            child.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """The sentinel kills what still lives, removes what it was told to, and is gone when this returns."""
        assert self._sentinel.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._sentinel.stdin.close()
        self._sentinel.wait()

    def _forget(self, child: "Child") -> None:
        self._living.discard(child)
        self._tell("forget", child.process.pid)

    def _tell(self, word: str, value: int | str) -> None:
        assert self._sentinel.stdin is not None
        # Somebody may have killed the sentinel; the children themselves still die with us.
        with contextlib.suppress(BrokenPipeError):
            self._sentinel.stdin.write(json.dumps({word: value}).encode() + b"\n")
            self._sentinel.stdin.flush()


class Child:
    """A running process.

    `ended` holds its exit code (negative: the signal) once its whole group is dead and its output read.
    """

    def __init__(
        self,
        name: str,
        process: subprocess.Popen[bytes],
        on_line: Callable[[bytes], None],
        on_error_line: Callable[[bytes], None] | None,
        on_end: Callable[["Child"], None],
    ) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self.name = name
        self.process = process
        self.stderr = Tail()
        self._readers = [
            LineReader(process.stdout, on_line),
            LineReader(process.stderr, on_error_line, self.stderr),
        ]
        self._on_end = on_end
        self.ended = asyncio.create_task(self._until_ended())

    @property
    def is_alive(self) -> bool:
        return not self.ended.done()

    def tell(self, line: bytes) -> bool:
        """Its only line of input; then its stdin ends. False: it has ended, or is about to."""
        if not self.is_alive:
            return False
        assert self.process.stdin is not None
        try:
            with self.process.stdin as stdin:
                stdin.write(line + b"\n")
        except BrokenPipeError:
            return False
        return True

    def kill(self) -> None:
        """SIGKILL to the process and whatever it started in its group."""
        if self.is_alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def ask_to_end(self) -> None:
        """SIGTERM to the process, which ends its own children."""
        if self.is_alive:
            self.process.send_signal(signal.SIGTERM)

    async def wait(self) -> int:
        """The exit code, once it has ended. Cancelling this leaves it running."""
        await asyncio.wait([self.ended])
        return self.ended.result()

    async def end(self, timeout_s: float, log: Log, span: Span | None = None) -> None:
        """SIGTERM, and SIGKILL if it is still there `timeout_s` later."""
        if not self.is_alive:
            return
        log.info(f"Terminating {self.name}", span)
        self.ask_to_end()
        log.info(f"Waiting for {self.name} to gracefully shutdown", span)
        done, _ = await asyncio.wait([self.ended], timeout=timeout_s)
        if done:
            log.info(f"{self.name} terminated", span)
            return
        log.info(f"Killing {self.name}", span)
        self.kill()
        await self.wait()
        log.info(f"{self.name} killed", span)

    async def _until_ended(self) -> int:
        await self._until_exited()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        await asyncio.wait([reader.at_end for reader in self._readers], timeout=DRAIN_S)
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        for reader in self._readers:
            reader.close()  # not at its end where a descendant that left the group holds the pipe
        self._on_end(self)
        return code

    async def _until_exited(self) -> None:
        try:
            file = os.pidfd_open(self.process.pid)
        except (AttributeError, OSError):  # not on every system
            while not self._has_exited():  # noqa: ASYNC110 there, the end of a process sets no Event
                await asyncio.sleep(POLL_S)
            return
        loop, exited = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(file, exited.set)
        try:
            await exited.wait()
        finally:
            loop.remove_reader(file)
            os.close(file)

    def _has_exited(self) -> bool:
        """Looks without reaping: until it is reaped, its group's number cannot pass to somebody else."""
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


class LineReader:
    """Hands over each line of a pipe as it comes. `at_end` is done when every writer has closed it."""

    def __init__(
        self, pipe: IO[bytes], on_line: Callable[[bytes], None] | None, tail: Tail | None = None
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.at_end: asyncio.Future[None] = self._loop.create_future()
        self._pipe = pipe
        self._on_line = on_line
        self._tail = tail
        self._lines = Lines()
        os.set_blocking(pipe.fileno(), False)
        self._loop.add_reader(pipe.fileno(), self._read)

    def close(self) -> None:
        self._loop.remove_reader(self._pipe.fileno())
        self._deliver(self._lines.end())
        self._pipe.close()

    def _read(self) -> None:
        try:
            chunk = os.read(self._pipe.fileno(), READ_BYTES)
        except BlockingIOError:
            return
        if not chunk:
            self._loop.remove_reader(self._pipe.fileno())
            self.at_end.set_result(None)
            return
        if self._tail is not None:
            self._tail.feed(chunk)
        self._deliver(self._lines.feed(chunk))

    def _deliver(self, lines: list[bytes]) -> None:
        if self._on_line is not None:
            for line in lines:
                self._on_line(line)
