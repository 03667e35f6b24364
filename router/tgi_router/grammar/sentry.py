"""Tries grammars in processes of its own, because a small one can keep the compiler busy for hours.

Threads cannot be stopped; processes can. Each answers one grammar after the other; one whose answer nobody
waits for any more is killed, and replaced when it is needed again. Run as a module, this file is such a
process.
"""

import asyncio
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from llguidance import LLMatcher, LLParserLimits

NUM_PROCESSES = 2
MEMORY_BYTES = 2 << 30
MAX_CHECK_S = 10  # after which a process ends itself: its router may be gone
MODULE = "tgi_router.grammar.sentry"
# Its processes give way to the router and the shards. On busy cores they get about a tenth of an equal's
# time: what is sensible compiles in milliseconds, and is through long before it is given up.
NICENESS = 10

Process = subprocess.Popen[bytes]

# Beyond them a grammar is refused, or an answer ends with an error. A lexer state takes one or two kilobytes.
LIMITS = LLParserLimits(max_lexer_states=32_768, verbose_errors=False)


class CheckFailed(Exception):
    """A process ended without an answer: the grammar took too much memory."""


class Sentry:
    """Processes are started when they are needed, by Popen: what uvloop starts is forked, and gRPC's
    threads do not go well with that.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(2 * NUM_PROCESSES, thread_name_prefix="grammar-sentry")
        self._processes: asyncio.Queue[Process | None] = asyncio.Queue()
        for _ in range(NUM_PROCESSES):
            self._processes.put_nowait(None)

    async def check(self, grammar: str) -> str:
        """What is wrong with a grammar; empty if nothing is. Raises CheckFailed.

        Cancel it to bound the time.
        """
        loop = asyncio.get_running_loop()
        process = await self._processes.get()
        try:
            if process is None:
                process = _start()
            return await loop.run_in_executor(self._threads, _ask, process, grammar)
        except BaseException:  # cancelled, most likely: it is still busy
            if process is not None:
                process.kill()
                self._threads.submit(_clean_up, process)
            process = None
            raise
        finally:
            self._processes.put_nowait(process)

    async def close(self) -> None:
        while not self._processes.empty():
            process = self._processes.get_nowait()
            if process is not None:
                process.kill()
                self._threads.submit(_clean_up, process)
        await asyncio.to_thread(self._threads.shutdown)


def _start() -> Process:
    command = [sys.executable, "-m", MODULE]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _ask(process: Process, grammar: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(grammar).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError as error:
        raise CheckFailed from error
    if not (line := process.stdout.readline()):
        raise CheckFailed
    return str(json.loads(line))


def _clean_up(process: Process) -> None:
    """Of a process that was killed."""
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):  # what it did not read
            pipe.close()


def answer_until_closed() -> None:
    os.nice(NICENESS)  # from here on: a client waits while a process starts
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the router says when it is over
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in sys.stdin:
        signal.alarm(MAX_CHECK_S)
        is_error, messages = LLMatcher.validate_grammar_with_warnings(json.loads(line), limits=LIMITS)
        signal.alarm(0)
        print(json.dumps(messages[0] if is_error else ""), flush=True)


if __name__ == "__main__":
    answer_until_closed()
