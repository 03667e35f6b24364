"""The pause that the death of a shard costs: from `kill -9` to the next token of a stream.

    python bench/restart.py --kills 10

Each kill has a server of its own, so each is the first of a row: the launcher waits before the later ones.
With and without processes that stand by take turns; `--only` measures one of them. What follows `--` goes to
the launcher. See README.md.
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from soak import Server, serving

KINDS = {"standby": ["--standby-shards"], "cold": ["--no-standby-shards"], "default": []}
NUM_TOKENS_BEFORE = 10
NUM_TOKENS = 1000
QUIET_SHARE = 0.05  # of a core: what a server uses that has nothing to do
QUIET_TIMEOUT_S = 120.0
TIMEOUT_S = 300.0


@dataclass(slots=True)
class Times:
    ready_s: list[float] = field(default_factory=list)  # from the launcher's start to a healthy server
    pauses_s: list[float] = field(default_factory=list)

    def describe(self) -> str:
        pauses = self.pauses_s
        return (
            f"pause median {statistics.median(pauses):.2f} s, {min(pauses):.2f} to {max(pauses):.2f} s; "
            f"start to ready median {statistics.median(self.ready_s):.2f} s; {len(pauses)} kills"
        )


def wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline and server.launcher.is_running():
        try:
            if httpx.get(f"{server.url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.02)
    sys.exit(f"The server did not start:\n{server.log.read_text(errors='replace')[-4000:]}")


def wait_until_quiet(server: Server) -> None:
    """Until no process of the server has anything to do: what starts in the background has started."""
    deadline = time.monotonic() + QUIET_TIMEOUT_S
    num_quiet = 0
    while num_quiet < 4 and time.monotonic() < deadline:  # in a row: a start has its pauses
        before = cpu_s(server)
        time.sleep(2)
        num_quiet = num_quiet + 1 if cpu_s(server) - before < 2 * QUIET_SHARE else 0


def cpu_s(server: Server) -> float:
    processes = [server.launcher, *server.launcher.children()]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def shard_pids(server: Server) -> list[int]:
    """Of those that serve: they hold the sockets."""
    pids = {}
    for child in server.launcher.children():
        pids |= {str(connection.laddr): child.pid for connection in child.net_connections("unix")}
    return [pid for path, pid in sorted(pids.items()) if path.rpartition("-")[0].endswith("/shard")]


def pause_s(server: Server) -> float:
    """Kill the last rank in the middle of a stream. Seconds from there to the end of the longest gap."""
    body = {
        "inputs": "Once upon a time",
        "parameters": {"max_new_tokens": NUM_TOKENS, "do_sample": True, "seed": 1},
    }
    times: list[float] = []
    killed_at = 0.0
    with (
        httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as http,
        http.stream("POST", "/generate_stream", json=body) as response,
    ):
        for line in response.iter_lines():
            if not line.startswith("data:"):
                continue
            if "error" in json.loads(line.removeprefix("data:")):
                sys.exit(f"The stream broke: {line}\n{server.log.read_text(errors='replace')[-4000:]}")
            times.append(time.monotonic())
            if len(times) == NUM_TOKENS_BEFORE:
                victim = shard_pids(server)[-1]
                killed_at = time.monotonic()
                os.kill(victim, signal.SIGKILL)
    # What was on its way when the shard died still came: the gap begins a little later.
    after = [killed_at, *(at for at in times if at > killed_at)]
    gaps = [(later - earlier, later) for earlier, later in itertools.pairwise(after)]
    return max(gaps)[1] - killed_at


def main() -> None:
    parser = argparse.ArgumentParser(description="How long a stream stands still when its shard is killed.")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--kills", type=int, default=10, help="of each kind")
    parser.add_argument("--num-shard", type=int, default=1)
    parser.add_argument(
        "--only", choices=KINDS, help="`default`: without an option, for a version that has none"
    )
    parser.add_argument("--log", type=Path, help="append what the servers logged to this file")
    parser.add_argument("options", nargs="*", help="for the launcher")
    options = parser.parse_args()
    all_times = {name: Times() for name in ([options.only] if options.only else ["standby", "cold"])}
    for _ in range(options.kills):
        for name, times in all_times.items():
            args = ["--num-shard", str(options.num_shard), *KINDS[name], *options.options]
            began_at = time.monotonic()
            with serving(options.model, args) as server:
                wait_until_ready(server)
                times.ready_s.append(time.monotonic() - began_at)
                wait_until_quiet(server)
                times.pauses_s.append(pause_s(server))
                if options.log is not None:
                    with options.log.open("a") as log:
                        log.write(server.log.read_text(errors="replace"))
            print(f"{name}: {times.pauses_s[-1]:.2f} s", file=sys.stderr, flush=True)
    for name, times in all_times.items():
        print(f"{name}: {times.describe()}")


if __name__ == "__main__":
    main()
