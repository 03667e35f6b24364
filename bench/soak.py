"""Keeps a server of its own saturated with mixed traffic for minutes, and tells whether anything leaked.

    python bench/soak.py --minutes 10

Of the requests 20% are given up midway, by closing the connection. After the warm-up every process's memory
is sampled, and a line is laid through it; at the end, with nothing running, files, threads, KV blocks and
permits are compared with what they were before. Exit code 0: nothing grew, no request failed. See README.md.
"""

import argparse
import asyncio
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

ABORTED_SHARE = 0.2
SAMPLE_S = 2.0
OVERLOAD_PAUSE_S = 0.5  # before a refused client asks again
MAX_SLOPE_MB_PER_MIN = 1.0
MAX_MORE_FILES = 4
MAX_MORE_THREADS = 4
START_TIMEOUT_S = 600.0
IDLE_TIMEOUT_S = 60.0
WARM_UP_SHARE = 0.3  # of the time, for what is allocated once: the prefix cache, pools, compiled templates

WORDS = (
    "time",
    "sea",
    "stone",
    "river",
    "light",
    "hand",
    "night",
    "winter",
    "letter",
    "road",
    "city",
    "garden",
)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "size": {"type": "integer", "maximum": 99}},
    "required": ["name", "size"],
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One process at one time."""

    at: float  # seconds
    rss_mb: float
    num_files: int
    num_threads: int


@dataclass(slots=True)
class Traffic:
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ProcessReport:
    name: str
    slope_mb_per_min: float
    rss_mb: float  # the median of the last tenth
    files_before: int
    files_after: int
    threads_before: int
    threads_after: int

    def problems(self) -> list[str]:
        found = []
        if self.slope_mb_per_min >= MAX_SLOPE_MB_PER_MIN:
            found.append(f"{self.name} grows by {self.slope_mb_per_min:.2f} MB/min")
        if self.files_after > self.files_before + MAX_MORE_FILES:
            found.append(f"{self.name} has {self.files_after} open files, {self.files_before} before")
        if self.threads_after > self.threads_before + MAX_MORE_THREADS:
            found.append(f"{self.name} has {self.threads_after} threads, {self.threads_before} before")
        return found


class Server:
    """A launcher with free ports."""

    def __init__(self, url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.url, self.log = url, log
        self.launcher = psutil.Process(process.pid)

    def processes(self) -> dict[str, psutil.Process]:
        """By name: launcher, router, shard 0, ..."""
        found = {"launcher": self.launcher}
        for child in self.launcher.children():
            command = " ".join(child.cmdline())
            if "text-generation-router" in command:
                found["router"] = child
            elif "text-generation-server" in command:
                found[f"shard {child.environ().get('RANK', '0')}"] = child
        return dict(sorted(found.items()))

    def sample(self) -> dict[str, Sample]:
        now = time.monotonic()
        return {
            name: Sample(now, process.memory_info().rss / 1e6, process.num_fds(), process.num_threads())
            for name, process in self.processes().items()
        }


@contextmanager
def serving(model: str, args: list[str]) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        port, log = free_port(), Path(folder) / "server.log"
        command = [
            str(Path(sys.executable).with_name("text-generation-launcher")),
            *("--model-id", model, "--hostname", "127.0.0.1", "--port", str(port)),
            *("--prometheus-port", str(free_port()), "--shard-uds-path", f"{folder}/shard"),
            *("--master-port", str(free_port()), *args),
        ]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield Server(f"http://127.0.0.1:{port}", process, log)
        finally:
            process.terminate()
            process.wait(120)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def slope_per_min(samples: list[Sample]) -> float:
    """Of the line of least squares through the memory."""
    if len(samples) < 2:
        return 0.0
    line = statistics.linear_regression([s.at / 60 for s in samples], [s.rss_mb for s in samples])
    return line.slope


def request(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """A path and a body, of one of seven kinds."""
    prompt = " ".join(draw.choices(WORDS, k=draw.randrange(3, 120)))
    num_tokens = draw.randrange(8, 96)
    sampled = {"do_sample": True, "seed": draw.randrange(2**31), "temperature": 1.1}
    native: dict[str, Any] = {"max_new_tokens": num_tokens, "details": True}
    openai = {"model": "tgi", "max_tokens": num_tokens}
    match draw.randrange(7):
        case 0:
            return "/generate_stream", {"inputs": prompt, "parameters": native}
        case 1:
            extra = sampled | {"repetition_penalty": 1.2, "top_n_tokens": 2}
            return "/generate_stream", {"inputs": prompt, "parameters": native | extra}
        case 2:
            return "/generate", {"inputs": prompt, "parameters": native | sampled | {"stop": ["the", "12"]}}
        case 3:
            grammar = {"type": "json", "value": SCHEMA}
            return "/generate_stream", {
                "inputs": prompt,
                "parameters": native | sampled | {"grammar": grammar},
            }
        case 4:
            return "/v1/completions", openai | {"prompt": prompt, "n": 2, "stream": True, "temperature": 1.0}
        case 5:
            messages = [{"role": "user", "content": prompt}]
            return "/v1/chat/completions", openai | {"messages": messages, "stream": True, "logprobs": True}
        case _:
            return "/generate", {"inputs": "", "parameters": {}}  # refused: an empty prompt


async def client(http: aiohttp.ClientSession, draw: random.Random, until: float, traffic: Traffic) -> None:
    while time.monotonic() < until:
        path, body = request(draw)
        is_aborted = draw.random() < ABORTED_SHARE
        try:
            outcome = await send(http, path, body, draw.randrange(1, 12) if is_aborted else None, traffic)
        except (aiohttp.ClientError, TimeoutError) as error:
            outcome = "failed"
            traffic.failures[f"{type(error).__name__}: {error}"[:200]] += 1
        traffic.outcomes[outcome] += 1
        if outcome == "overloaded":
            await asyncio.sleep(OVERLOAD_PAUSE_S)


async def send(
    http: aiohttp.ClientSession, path: str, body: dict[str, Any], max_chunks: int | None, traffic: Traffic
) -> str:
    """What became of it. max_chunks: after how many pieces of the answer to hang up; None: never.

    An answer in one piece is given up after as many hundredths of a second.
    """
    if max_chunks is not None and path == "/generate" and body["inputs"]:
        try:
            async with asyncio.timeout(max_chunks / 100), http.post(path, json=body) as response:
                await response.read()
        except TimeoutError:
            return "aborted"
        return "done"
    async with http.post(path, json=body) as response:
        if response.status == 429:
            return "overloaded"
        if response.status == 422 and not body.get("inputs", "x"):
            return "refused"
        last = b""
        num_chunks = 0
        async for chunk in response.content.iter_any():
            traffic.num_bytes += len(chunk)
            num_chunks += 1
            last = (last + chunk)[-2000:]
            if num_chunks == max_chunks:
                response.close()
                return "aborted"
        if b'"error_type":"overloaded"' in last:  # TGI's streams tell it in an event
            return "overloaded"
        if response.status != 200 or b'"error_type"' in last:
            traffic.failures[f"{path} {response.status} {last[:200]!r}"] += 1
            return "failed"
        return "done"


async def load(
    server: Server, concurrency: int, seconds: float, seed: int, samples: dict[str, list[Sample]]
) -> Traffic:
    traffic, until = Traffic(), time.monotonic() + seconds
    timeout = aiohttp.ClientTimeout(total=300)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(server.url, timeout=timeout, connector=connector) as http:
        clients = [
            asyncio.create_task(client(http, random.Random(seed * 100_003 + index), until, traffic))
            for index in range(concurrency)
        ]
        while time.monotonic() < until:
            for name, sample in server.sample().items():
                samples.setdefault(name, []).append(sample)
            await asyncio.sleep(SAMPLE_S)
        await asyncio.gather(*clients)
    return traffic


async def metrics(server: Server) -> dict[str, float]:
    async with aiohttp.ClientSession() as http, http.get(f"{server.url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return {line.split(" ")[0]: float(line.split(" ")[1]) for line in lines if line and line[0] != "#"}


async def wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    async with aiohttp.ClientSession() as http:
        while time.monotonic() < deadline and server.launcher.is_running():
            try:
                async with http.get(f"{server.url}/health") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.2)
    sys.exit(f"The server did not start:\n{server.log.read_text(errors='replace')[-4000:]}")


async def until_idle(server: Server) -> dict[str, float]:
    """The metrics, once nothing runs and nothing waits, or after a while."""
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    while True:
        now = await metrics(server)
        names = ("tgi_kv_blocks_used", "tgi_batch_current_size", "tgi_queue_size")
        if not any(now[name] for name in names) or time.monotonic() > deadline:
            return now
        await asyncio.sleep(0.5)


async def num_refused(server: Server, num_permits: int) -> int:
    """Of as many requests at once as there are permits: a permit that leaked shows as a 429."""

    async def ask(http: aiohttp.ClientSession) -> int:
        body = {"inputs": "time", "parameters": {"max_new_tokens": 64}}
        async with http.post("/generate", json=body) as response:
            await response.read()
            return response.status

    async with aiohttp.ClientSession(server.url, connector=aiohttp.TCPConnector(limit=0)) as http:
        statuses = await asyncio.gather(*(ask(http) for _ in range(num_permits)))
    return sum(status != 200 for status in statuses)


async def soak(server: Server, options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The report, and what is wrong."""
    await wait_until_ready(server)
    seconds = options.minutes * 60
    await load(server, options.concurrency, min(20.0, seconds / 4), options.seed + 1, {})
    await until_idle(server)
    before = server.sample()
    samples: dict[str, list[Sample]] = {}
    traffic = await load(server, options.concurrency, seconds, options.seed, samples)
    idle = await until_idle(server)
    refused = await num_refused(server, options.permits)
    await until_idle(server)
    await asyncio.sleep(1)
    after = server.sample()
    processes = []
    for name, all_samples in samples.items():
        warm = all_samples[int(len(all_samples) * WARM_UP_SHARE) :]
        tail = warm[-max(1, len(warm) // 10) :]
        processes.append(
            ProcessReport(
                name=name,
                slope_mb_per_min=slope_per_min(warm),
                rss_mb=statistics.median(sample.rss_mb for sample in tail),
                files_before=before[name].num_files,
                files_after=after[name].num_files,
                threads_before=before[name].num_threads,
                threads_after=after[name].num_threads,
            )
        )
    problems = [problem for process in processes for problem in process.problems()]
    problems += [f"{count} x {what}" for what, count in traffic.failures.most_common(5)]
    for name in ("tgi_kv_blocks_used", "tgi_batch_current_size", "tgi_queue_size"):
        if idle[name]:
            problems.append(f"{name} is {idle[name]:.0f} with nothing to do")
    if refused:
        problems.append(f"{refused} of {options.permits} requests at once were refused: permits are gone")
    if sorted(before) != sorted(after) or idle.get("tgi_recoveries", 0):
        problems.append("a process was restarted")
    report = {
        "minutes": options.minutes,
        "concurrency": options.concurrency,
        "requests": dict(traffic.outcomes),
        "processes": [asdict(process) for process in processes],
        "permits_missing": refused,
        "kv_blocks_used": idle["tgi_kv_blocks_used"],
        "prefix_cache_blocks": idle["tgi_prefix_cache_blocks"],
        "kv_blocks_total": idle["tgi_kv_blocks_total"],
        "preemptions": idle.get("tgi_preemptions", 0.0),
        "problems": problems,
    }
    return report, problems


def describe(report: dict[str, Any]) -> str:
    lines = [f"{report['minutes']} minutes, {report['concurrency']} clients: {report['requests']}"]
    lines += [
        f"  {process['name']:<9} {process['slope_mb_per_min']:+7.3f} MB/min  {process['rss_mb']:8.1f} MB  "
        f"files {process['files_before']} -> {process['files_after']}  "
        f"threads {process['threads_before']} -> {process['threads_after']}"
        for process in report["processes"]
    ]
    lines.append(
        f"  KV blocks: {report['kv_blocks_used']:.0f} used at the end, {report['prefix_cache_blocks']:.0f} "
        f"cached, of {report['kv_blocks_total']:.0f}; preemptions {report['preemptions']:.0f}; "
        f"permits missing: {report['permits_missing']}"
    )
    lines += report["problems"] or ["Nothing leaked."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Saturates a server of its own and looks for leaks.")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--concurrency", type=int, default=72, help="clients; above --permits some get 429")
    parser.add_argument("--permits", type=int, default=64, help="the server's --max-concurrent-requests")
    parser.add_argument("--kv-tokens", type=int, default=8192, help="the server's --max-batch-total-tokens")
    parser.add_argument("--num-shard", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the report there")
    options = parser.parse_args()
    args = ["--max-concurrent-requests", str(options.permits), "--num-shard", str(options.num_shard)]
    # Few blocks, so that all have been touched when the warm-up is over: fresh memory becomes resident then.
    limits = ["--max-batch-total-tokens", str(options.kv_tokens), "--max-total-tokens", "2048"]
    # The processes that stand by do nothing that could leak, and are started while the rest is measured.
    with serving(options.model, [*args, *limits, "--no-standby-shards"]) as server:
        report, problems = asyncio.run(soak(server, options))
    print(describe(report))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
