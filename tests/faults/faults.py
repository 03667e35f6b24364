"""Real faults: shards of a real server are killed, stopped, cut off or broken while 16 mixed streams run.

    python tests/faults/faults.py --faults 200
    python tests/faults/faults.py --faults 200 --num-shard 2 --kinds kill
    python tests/faults/faults.py --faults 200 --deterministic --dtype bfloat16

A fault of the kind `close` shuts the socket between router and shard down; `raise` makes a shard's next step
raise (injected/sitecustomize.py). Linux only, and the processes must be allowed to trace their children.

Every stream's whole output is compared with what the same request gave undisturbed. The launcher waits twice
as long before each restart in a row, so each server lives through `FAULTS_PER_SERVER` of them, and the next
one begins with the shortest wait again. The pause that is reported is a stream's longest gap between events
after a fault: it holds the launcher's wait, the start of the shards and the recomputation.
"""

import argparse
import ctypes
import itertools
import json
import math
import os
import random
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a program

import tiny_models
from server import Server

Fault = Literal["kill", "stop", "close", "raise"]

WEIGHTS: dict[Fault, int] = {"kill": 6, "stop": 2, "close": 1, "raise": 1}  # how often each is drawn
INJECTED = Path(__file__).parent / "injected"
PIDFD_GETFD = 438  # the system call's number, on every architecture
FAULTS_PER_SERVER = 5
STALL_TIMEOUT_S = 10
NUM_TOKENS = 400  # of a long answer; the model has room for 512
LOGPROB_TOLERANCE = 1e-3  # a prompt's sums are not those of its tokens one by one
PATIENCE_S = 240.0  # for the machine may be busy

SCHEMA = {
    "type": "object",
    "properties": {
        "numbers": {
            "type": "array",
            "items": {"type": "integer", "minimum": 100, "maximum": 999},
            "minItems": 40,
            "maxItems": 40,
        }
    },
    "required": ["numbers"],
}


@dataclass(frozen=True, slots=True)
class Request:
    name: str
    path: str
    body: dict[str, Any]


@dataclass(slots=True)
class Answer:
    """All that a stream said, in order, and when."""

    texts: dict[int, str] = field(default_factory=dict)  # by choice
    token_ids: list[int] = field(default_factory=list)
    logprobs: dict[int, list[float]] = field(default_factory=dict)  # by choice
    endings: dict[int, Any] = field(default_factory=dict)  # by choice: reason, whole text
    times: list[float] = field(default_factory=list)

    def difference(self, other: "Answer", tolerance: float = LOGPROB_TOLERANCE) -> str | None:
        """What of `other` is not as it is here; None if all is. tolerance: for logprobs."""
        for name in ("token_ids", "texts", "endings"):
            mine, its = getattr(self, name), getattr(other, name)
            if mine != its:
                return f"{name}: {its!r} instead of {mine!r}"
        for choice, mine in self.logprobs.items():
            its = other.logprobs.get(choice, [])
            if len(mine) != len(its):
                return f"{len(its)} logprobs instead of {len(mine)}"
            worst = max((abs(a - b) for a, b in zip(mine, its, strict=True)), default=0.0)
            if worst > tolerance:
                return f"a logprob is off by {worst}"
        return None


@dataclass(slots=True)
class Report:
    is_exact: bool = False  # logprobs must be equal too
    num_faults: dict[Fault, int] = field(default_factory=lambda: dict.fromkeys(get_args(Fault), 0))
    num_answers: int = 0
    num_disturbed: int = 0  # answers with a fault in their midst
    problems: list[str] = field(default_factory=list)
    pauses_s: list[float] = field(default_factory=list)

    @property
    def tolerance(self) -> float:
        return 0.0 if self.is_exact else LOGPROB_TOLERANCE

    def note(self, problem: str) -> None:
        self.problems.append(problem)
        print(problem[:500], file=sys.stderr, flush=True)

    def describe(self) -> str:
        pauses = sorted(self.pauses_s)
        p50 = statistics.median(pauses) if pauses else 0.0
        p99 = pauses[int(0.99 * (len(pauses) - 1))] if pauses else 0.0
        faults = ", ".join(f"{fault} {count}" for fault, count in self.num_faults.items() if count)
        return (
            f"faults: {faults}; {self.num_answers} answers, "
            f"{self.num_disturbed} of them through a fault; {len(self.problems)} failed or different; pause "
            f"of a stream p50 {p50:.1f} s, p99 {p99:.1f} s"
        )


def requests(greedy_text: str) -> list[Request]:
    """16 streams. greedy_text: an undisturbed answer, out of whose second half a stop string is taken."""
    stop = greedy_text[len(greedy_text) * 3 // 4 :][:6]
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("greedy", {}),
        ("seeded", {"do_sample": True, "seed": 11, "temperature": 1.2, "top_p": 0.9}),
        ("penalties", {"repetition_penalty": 1.3, "frequency_penalty": 0.3, "do_sample": True, "seed": 5}),
        ("stop string", {"stop": [stop]}),
        ("JSON schema", {"grammar": {"type": "json", "value": SCHEMA}, "do_sample": True, "seed": 3}),
        ("top logprobs", {"top_n_tokens": 3, "do_sample": True, "seed": 8}),
        ("typical", {"do_sample": True, "seed": 21, "typical_p": 0.8, "top_k": 20}),
    ]
    found = [
        Request(
            f"{name}, {prompt!r}",
            "/generate_stream",
            {"inputs": prompt, "parameters": {"max_new_tokens": NUM_TOKENS, "details": True, **parameters}},
        )
        for name, parameters in kinds
        for prompt in ("Once upon a time", "The sea")
    ]
    body = {
        "model": "tgi",
        "prompt": "Once",
        "max_tokens": 250,
        "n": 2,
        "seed": 9,
        "stream": True,
        "logprobs": 1,
    }
    found += [
        Request("two choices", "/v1/completions", body | {"temperature": 1.1}),
        Request("two choices, penalised", "/v1/completions", body | {"presence_penalty": 0.5}),
    ]
    assert len(found) == 16
    return found


def ask(client: httpx.Client, request: Request, on_event: threading.Semaphore | None = None) -> Answer:
    """Raises what httpx raises, and RuntimeError with what the server says."""
    answer = Answer()
    with client.stream("POST", request.path, json=request.body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"status {response.status_code}: {response.read()!r}")
        for line in response.iter_lines():
            if not line.startswith("data:") or line.endswith("[DONE]"):
                continue
            event = json.loads(line.removeprefix("data:"))
            if "error" in event:
                raise RuntimeError(str(event))
            answer.times.append(time.monotonic())
            if on_event is not None:
                on_event.release()
            _note(answer, event)
    return answer


def _note(answer: Answer, event: dict[str, Any]) -> None:
    if "token" in event:
        answer.token_ids.append(event["token"]["id"])
        logprobs = [token["logprob"] for token in [event["token"], *event.get("top_tokens", [])]]
        answer.logprobs.setdefault(0, []).extend(logprobs)
        answer.texts[0] = answer.texts.get(0, "") + event["token"]["text"]
        if event["generated_text"] is not None:
            details = event["details"]
            ending = (event["generated_text"], details["finish_reason"], details["generated_tokens"])
            answer.endings[0] = ending
        return
    for choice in event["choices"]:
        index = choice["index"]
        answer.texts[index] = answer.texts.get(index, "") + choice["text"]
        if choice["logprobs"] is not None:
            answer.logprobs.setdefault(index, []).extend(choice["logprobs"]["token_logprobs"])
        if choice["finish_reason"] is not None:
            answer.endings[index] = choice["finish_reason"]


def run(num_faults: int, seed: int, *args: str, kinds: Sequence[Fault] = get_args(Fault)) -> Report:
    """args: options of the launcher. With --deterministic among them, logprobs must be equal too."""
    report, draw = Report(is_exact="--deterministic" in args), random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_models.save("llama", Path(folder) / "model", seed=3)
        tiny_models.never_ends(model)
        expected: dict[str, Answer] = {}
        while (left := num_faults - sum(report.num_faults.values())) > 0:
            place = Path(tempfile.mkdtemp(dir=folder))
            options = ("--stall-timeout", str(STALL_TIMEOUT_S), *args)
            with Server(str(model), place, *options, python_path=INJECTED) as server:
                streams = requests(server.text("Once upon a time", max_new_tokens=NUM_TOKENS))
                if not expected:
                    expected = {stream.name: ask(server.client, stream) for stream in streams}
                faults = draw.choices(
                    kinds, [WEIGHTS[kind] for kind in kinds], k=min(left, FAULTS_PER_SERVER)
                )
                _disturb(server, streams, expected, faults, draw, report)
                server.wait_for_metric("tgi_kv_blocks_used", 0, timeout_s=PATIENCE_S)
            print(report.describe(), file=sys.stderr, flush=True)
    return report


def _disturb(
    server: Server,
    streams: list[Request],
    expected: dict[str, Answer],
    faults: list[Fault],
    draw: random.Random,
    report: Report,
) -> None:
    """Keep all streams running, each again when it has ended, until the faults are over."""
    faults_at: list[float] = []
    is_over = threading.Event()
    events = threading.Semaphore(0)
    lock = threading.Lock()

    def client(stream: Request) -> None:
        with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http:
            while not is_over.is_set():
                try:
                    answer = ask(http, stream, events)
                except (httpx.HTTPError, RuntimeError) as error:
                    with lock:
                        report.num_answers += 1
                        report.note(f"{stream.name}: {type(error).__name__}: {error}")
                    return
                pauses = pauses_s(answer.times, faults_at)
                with lock:
                    report.num_answers += 1
                    report.num_disturbed += bool(pauses)
                    report.pauses_s += pauses
                    if (difference := expected[stream.name].difference(answer, report.tolerance)) is not None:
                        report.note(f"{stream.name}: {difference}")

    with _running([threading.Thread(target=client, args=(stream,)) for stream in streams], is_over):
        for fault in faults:
            _await(events, draw.randrange(20, 2000), server)
            victim = draw.choice(server.shard_pids)
            num_recoveries = server.metric("tgi_recoveries")
            faults_at.append(time.monotonic())
            inflict(fault, victim)
            report.num_faults[fault] += 1
            deadline = time.monotonic() + PATIENCE_S
            while server.metric("tgi_recoveries") == num_recoveries or not server.is_healthy():
                if time.monotonic() > deadline:
                    raise AssertionError(f"no recovery from a {fault}\n{server.log()}")
                time.sleep(0.05)
            while events.acquire(blocking=False):  # count anew: the next fault is for streams that go on
                pass


def inflict(fault: Fault, shard_pid: int) -> None:
    match fault:
        case "kill":
            os.kill(shard_pid, signal.SIGKILL)
        case "stop":
            os.kill(shard_pid, signal.SIGSTOP)
        case "raise":
            os.kill(shard_pid, signal.SIGUSR1)
        case "close":
            for connection in _borrow_connections(shard_pid):
                connection.shutdown(socket.SHUT_RDWR)
                connection.close()


def _borrow_connections(pid: int) -> Iterator[socket.socket]:
    """The process's connected Unix sockets that have a path: those that clients of its server opened."""
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    connected = {f"socket:[{row[6]}]" for row in rows if len(row) > 7 and row[5] == "03"}
    libc, process = ctypes.CDLL(None, use_errno=True), os.pidfd_open(pid)
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(entry)
            except FileNotFoundError:  # closed meanwhile
                continue
            if target in connected:
                borrowed = libc.syscall(PIDFD_GETFD, process, int(entry.name), 0)
                if borrowed < 0:
                    raise OSError(ctypes.get_errno(), "pidfd_getfd")
                yield socket.socket(fileno=borrowed)
    finally:
        os.close(process)


def pauses_s(times: list[float], faults_at: list[float]) -> list[float]:
    """For each fault in the midst of a stream, the longest gap between events from there to the next fault.

    What is on its way to the client when the shard dies still arrives: the gap begins a little later.
    """
    gaps = list(itertools.pairwise(times))
    bounds = zip(faults_at, [*faults_at[1:], math.inf], strict=False)
    return [
        max(later - earlier for earlier, later in gaps if later > at and earlier < until)
        for at, until in bounds
        if times and times[0] < at < times[-1]
    ]


@contextmanager
def _running(threads: list[threading.Thread], is_over: threading.Event) -> Iterator[None]:
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def _await(events: threading.Semaphore, count: int, server: Server) -> None:
    deadline = time.monotonic() + PATIENCE_S
    for _ in range(count):
        if not events.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise AssertionError(f"the streams stand still\n{server.log()}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-shard", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=get_args(Fault), default=get_args(Fault))
    parser.add_argument("--dtype")
    parser.add_argument("--deterministic", action="store_true")
    options = parser.parse_args()
    args = ["--num-shard", str(options.num_shard)]
    if options.dtype is not None:
        args += ["--dtype", options.dtype]
    if options.deterministic:
        args.append("--deterministic")
    report = run(options.faults, options.seed, *args, kinds=options.kinds)
    print(report.describe())
    sys.exit(1 if report.problems else 0)


if __name__ == "__main__":
    main()
