"""Tries grammars in processes of its own, because a small one can keep the compiler busy for hours.

Threads cannot be stopped; processes can. Each answers one grammar after the other, and tries each in a child
that it forks: time and memory of a child are bounded, its end costs the others nothing, and the next one is
ready within a millisecond. (A fork of the router would stop everybody's streams for several, and a new
process keeps a core busy while it imports what it needs.) Run as a module, this file is such a process.
"""

import asyncio
import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from llguidance import LLMatcher, LLParserLimits

NUM_PROCESSES = 2
MEMORY_BYTES = 2 << 30
MAX_CHECK_S = 1.5
TOO_SLOW = f"it does not compile within {MAX_CHECK_S:g} s"
TOO_LARGE = "it takes too much memory to compile"
MODULE = "tgi_router.grammar.sentry"
# Its processes give way to the router and the shards. On busy cores they get about a tenth of an equal's
# time: what is sensible compiles in milliseconds, and is through long before it is given up. What is not
# through soon gets only what nobody else wants: Linux lets a thread that wakes up wait until the slice of the
# running one is over, nice or not, but not behind an idle one. A step on a CPU wakes its threads a hundred
# times.
NICENESS = 10
SENSIBLE_S = 0.02

# Beyond them a grammar is refused, or an answer ends with an error. A lexer state takes one or two kilobytes.
LIMITS = LLParserLimits(max_lexer_states=32_768, verbose_errors=False)


class CheckFailed(Exception):
    """A grammar could not be tried to its end: TOO_SLOW or TOO_LARGE."""


class Process:
    """One of the processes, started when it is needed; for one thread at a time.

    By Popen: what uvloop starts is forked, and gRPC's threads do not go well with that.
    """

    def __init__(self) -> None:
        self._popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it has imported what it needs, or has ended."""
        if self._popen is None:
            # A session of its own: a terminal's signals are not meant for it, and it ends with its children.
            self._popen = subprocess.Popen(
                [sys.executable, "-m", MODULE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            assert self._popen.stdout is not None
            self._popen.stdout.readline()

    def check(self, grammar: str) -> str:
        """As Sentry.check."""
        self.start()
        assert self._popen is not None
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        line = b""
        with contextlib.suppress(BrokenPipeError):
            self._popen.stdin.write(json.dumps(grammar).encode() + b"\n")
            self._popen.stdin.flush()
            line = self._popen.stdout.readline()
        if not line:
            self.end()
            raise CheckFailed(TOO_LARGE)
        problem: str | int = json.loads(line)
        if problem == signal.SIGALRM:
            raise CheckFailed(TOO_SLOW)
        if not isinstance(problem, str):
            raise CheckFailed(TOO_LARGE)
        return problem

    def end(self) -> None:
        """It and what it forked, at once."""
        if self._popen is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # what it did not read
                pipe.close()
        self._popen = None


class Sentry:
    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(NUM_PROCESSES, thread_name_prefix="grammar-sentry")
        self._all = [Process() for _ in range(NUM_PROCESSES)]
        self._free: asyncio.Queue[Process] = asyncio.Queue()
        for process in self._all:
            self._free.put_nowait(process)

    async def start(self) -> None:
        """The processes now, rather than when the first grammar waits for them. Before any check."""
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(self._threads, one.start) for one in self._all))

    async def check(self, grammar: str) -> str:
        """What is wrong with a grammar; empty if nothing is. Raises CheckFailed.

        Waits for a free process for as long as nobody cancels it.
        """
        process = await self._free.get()
        answer = asyncio.get_running_loop().run_in_executor(self._threads, process.check, grammar)

        def is_free(answer: "asyncio.Future[str]") -> None:
            if not answer.cancelled():
                answer.exception()  # seen, also if nobody waits any more
            self._free.put_nowait(process)

        answer.add_done_callback(is_free)
        return await asyncio.shield(answer)  # who gives up does not free the process

    async def close(self) -> None:
        for process in self._all:
            await asyncio.to_thread(process.end)
        await asyncio.to_thread(self._threads.shutdown)


def answer_until_closed() -> None:
    """An empty line when that can begin; then for each line a line: what is wrong with the grammar, or the
    number of the signal that ended it.
    """
    os.nice(NICENESS)  # from here on: a client may wait while a process starts
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print(flush=True)
    for line in sys.stdin:
        print(json.dumps(_try_in_child(json.loads(line))), flush=True)


def _try_in_child(grammar: str) -> str | int:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.setitimer(signal.ITIMER_REAL, MAX_CHECK_S)  # SIGALRM ends it, whatever it is doing
            is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=LIMITS)
            with os.fdopen(writing, "w") as pipe:
                json.dump(messages[0] if is_error else "", pipe)
        finally:
            os._exit(0)
    os.close(writing)
    if not select.select([reading], [], [], SENSIBLE_S)[0] and hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(child, os.SCHED_IDLE, os.sched_param(0))
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    return str(json.loads(answer)) if answer else os.WTERMSIG(status)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the router is gone
        answer_until_closed()
