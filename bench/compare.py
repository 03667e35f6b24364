"""Two servers under the same load, in turns on one machine: medians of both, and their ratios.

    python bench/compare.py ours transformers --model /tmp/bench-model --repeats 3

Each repeat starts the first server, measures, stops it, then does the same with the second: A B A B. So a
machine that grows slower or busier for a while harms both. peers.md tells how to install the servers that
SERVERS names.
"""

import argparse
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from serve import ROUTES, Load, Report, Route, describe, run

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Server:
    """How to start one. {model}, {port} and {peers} are filled in; `environment` is added to ours."""

    command: str
    route: Route
    environment: dict[str, str]


SERVERS = {
    "ours": Server(
        "text-generation-launcher --model-id {model} --hostname 127.0.0.1 --port {port}",
        "generate",
        {"PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}"},  # the launcher looks up its commands there, too
    ),
    "transformers": Server(
        "{peers}/transformers/bin/transformers serve {model} --continuous-batching --device cpu "
        "--dtype bfloat16 --host 127.0.0.1 --port {port}",
        "completions",
        {"HF_HUB_OFFLINE": "1"},
    ),
    "vllm": Server(
        "{peers}/vllm/bin/python -m vllm.entrypoints.openai.api_server --model {model} "
        "--dtype bfloat16 --max-model-len 4096 --host 127.0.0.1 --port {port}",
        "completions",
        {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB
            "LD_PRELOAD": "{peers}/vllm/lib/libiomp5.so",
        },
    ),
}

METRICS = {  # name in a report -> title, and whether more is better
    "output_tokens_per_s": ("output tokens/s", True),
    "ttft_p50_ms": ("first token p50, ms", False),
    "ttft_p99_ms": ("first token p99, ms", False),
    "inter_token_p50_ms": ("between events p50, ms", False),
    "inter_token_p99_ms": ("between events p99, ms", False),
}


def main() -> None:
    options = _parse(sys.argv[1:])
    servers = dict(SERVERS)
    for name, command in options.command or ():
        route = servers[name].route if name in servers else options.route
        servers[name] = Server(command, route, servers[name].environment if name in servers else {})
    unknown = {options.first, options.second} - set(servers)
    if unknown:
        sys.exit(f"Unknown server {', '.join(sorted(unknown))}: known are {', '.join(servers)}.")

    reports: dict[str, dict[int, list[Report]]] = {
        name: {clients: [] for clients in options.concurrency} for name in (options.first, options.second)
    }
    for repeat in range(options.repeats):
        for name in reports:
            print(f"--- repeat {repeat + 1} of {options.repeats}: {name}", flush=True)
            with started(servers[name], name, options) as url:
                for clients in options.concurrency:
                    load = _load(servers[name], url, clients, options, seed=repeat)
                    report = run(load)
                    print(describe(load, report), flush=True)
                    reports[name][clients].append(report)
    print(table(reports, options.first, options.second))
    if options.json is not None:
        plain = {
            name: {
                clients: [asdict(report) for report in of_clients]
                for clients, of_clients in by_clients.items()
            }
            for name, by_clients in reports.items()
        }
        options.json.write_text(json.dumps(plain, indent=2) + "\n")
    if any(report.num_errors for by in reports.values() for of in by.values() for report in of):
        sys.exit("Requests failed: the numbers above are not comparable.")


def _load(server: Server, url: str, clients: int, options: argparse.Namespace, seed: int) -> Load:
    return Load(
        url=url,
        route=server.route,
        tokenizer=options.model,
        model=str(options.model),
        concurrency=clients,
        num_requests=clients * options.rounds,
        num_warmup=options.warmup,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        seed=1000 * seed + clients,  # both servers get the same prompts, and no prompt twice
    )


@contextmanager
def started(server: Server, name: str, options: argparse.Namespace) -> Iterator[str]:
    """The server's URL once it answers; it is stopped, with all its processes, at the end."""
    names = {"model": str(options.model), "port": str(_free_port()), "peers": str(options.peers)}
    environment = {key: value.format(**names) for key, value in server.environment.items()}
    url = f"http://127.0.0.1:{names['port']}"
    log = options.logs / f"{name}.log"
    with log.open("ab") as output:
        # Through env, so that the command is looked up in the PATH that it gets.
        given = ["/usr/bin/env", *(f"{key}={value}" for key, value in environment.items())]
        process = subprocess.Popen(
            given + shlex.split(server.command.format(**names)),
            stdout=output,
            stderr=output,
            start_new_session=True,  # its own process group: a server's workers are stopped with it
        )
    try:
        _wait_until_ready(process, url, options.start_timeout, log)
        yield url
    finally:
        _stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, timeout_s: float, log: Path) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            sys.exit(f"The server ended with exit code {process.returncode}, see {log}.")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    sys.exit(f"The server was not ready within {timeout_s:g} s, see {log}.")


def _stop(process: subprocess.Popen[bytes]) -> None:
    for sign, patience_s in ((signal.SIGTERM, 30), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
        time.sleep(1)  # the workers of a server that has ended end with it; whoever has not is killed
    process.wait()


def table(reports: dict[str, dict[int, list[Report]]], first: str, second: str) -> str:
    """Medians over the repeats, and how many times better the first server is than the second."""
    lines = ["", f"{'':28}{first:>16}{second:>16}{first + ' is better by':>28}"]
    for clients in reports[first]:
        lines.append(f"{clients} at a time")
        for metric, (title, more_is_better) in METRICS.items():
            ours, theirs = (_median(reports[name][clients], metric) for name in (first, second))
            if ours is None or theirs is None or not ours or not theirs:
                continue
            ratio = ours / theirs if more_is_better else theirs / ours
            lines.append(f"  {title:26}{ours:16.1f}{theirs:16.1f}{ratio:27.2f}x")
    return "\n".join(lines)


def _median(reports: list[Report], metric: str) -> float | None:
    values = [value for report in reports if (value := getattr(report, metric)) is not None]
    return statistics.median(values) if values else None


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("first", help=f"{', '.join(SERVERS)}, or a name given with --command")
    parser.add_argument("second")
    parser.add_argument("--model", type=Path, required=True, help="folder, see make_model.py")
    parser.add_argument(
        "--peers", type=Path, default=Path("/tmp/peers"), help="where the peers' environments lie"
    )
    parser.add_argument("--concurrency", type=int, nargs="+", default=[32, 1])
    parser.add_argument("--rounds", type=int, default=3, help="requests for each client")
    parser.add_argument("--repeats", type=int, default=3, help="starts of each server")
    parser.add_argument("--warmup", type=int, default=2, help="requests before each measurement")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument(
        "--start-timeout", type=float, default=300.0, help="for a server to be ready, in seconds"
    )
    parser.add_argument("--logs", type=Path, default=Path("/tmp"), help="folder for the servers' output")
    parser.add_argument(
        "--command",
        nargs=2,
        action="append",
        metavar=("NAME", "COMMAND"),
        help="how to start a server, in place of what is built in; with {model} and {port}",
    )
    parser.add_argument(
        "--route", choices=ROUTES, default="generate", help="of servers that only --command knows"
    )
    parser.add_argument("--json", type=Path, help="write all reports to this file")
    options = parser.parse_args(arguments)
    options.model, options.peers = options.model.resolve(), options.peers.resolve()
    return options


if __name__ == "__main__":
    main()
