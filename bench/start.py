"""From the launcher's start to ready, and how fast the weights are read, beside a plain read of their files.

    python bench/start.py --model /tmp/bench-model --repeats 5

In turns: the files dropped from the page cache and read plainly, dropped again and a server started, then
both once more with the files in the cache. "Cold" is the model's files alone: the libraries that all Python
programs share stay where they are. Whether a file has left the cache is asked of the kernel (mincore); the
run ends if it has not.

The phases of a start are told by the times of the server's own log lines.
"""

import argparse
import ctypes
import json
import mmap
import os
import re
import statistics
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from soak import Server, serving

BUFFER_BYTES = 16 << 20
START_TIMEOUT_S = 300.0
# A phase ends with the log line that has these words.
PHASES = {
    "launcher, download step": "Starting shard",
    "shard: imports": "Loaded ",  # less the loading itself, which the line tells
    "shard: gRPC server": "Shard ready",
    "router: imports, tokenizer": "Warming up model",
    "shard: a step as large as any to come": "Memory of this shard",
    "shard: KV blocks": "Setting max batch total tokens",
    "router: grammars' tokenizer, listen": "Connected",
}


@dataclass(frozen=True)
class Start:
    is_cold: bool
    total_s: float
    cpu_s: float  # of all its processes until then: what it costs however busy the machine is
    plain_read_s: float  # of the same files, just before
    loading_s: float  # as the shard tells it
    num_bytes: int
    phases: dict[str, float]
    load_average: float  # of the machine, just before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, required=True, help="folder, see make_model.py")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all starts to this file")
    parser.add_argument("launcher_args", nargs="*", help="after --: further options of the launcher")
    options = parser.parse_args()
    starts = []
    for _ in range(options.repeats):
        for is_cold in (True, False):
            starts.append(measure(options.model, options.launcher_args, is_cold=is_cold))
            print(_line(starts[-1]), flush=True)
    print(describe(starts))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(start) for start in starts], indent=2) + "\n")


def measure(model: Path, launcher_args: list[str], *, is_cold: bool) -> Start:
    files = sorted(model.glob("*.safetensors"))
    if is_cold:
        drop(files)
    plain_read_s = read_plainly(files)
    if is_cold:
        drop([*files, model / "tokenizer.json"])
    load_average = os.getloadavg()[0]
    began_at, began = time.monotonic(), time.time()
    with serving(str(model), ["--json-output", *launcher_args]) as server:
        wait_until_ready(server)
        total_s = time.monotonic() - began_at
        cpu_s = cpu_seconds(server)
        lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    loading_s, phases = read_log(lines, began)
    return Start(
        is_cold=is_cold,
        total_s=total_s,
        cpu_s=cpu_s,
        plain_read_s=plain_read_s,
        loading_s=loading_s,
        num_bytes=sum(file.stat().st_size for file in files),
        phases=phases,
        load_average=load_average,
    )


def cpu_seconds(server: Server) -> float:
    """Of the processes that run, and of those that the launcher has seen end."""
    running = [server.launcher, *server.launcher.children(recursive=True)]
    times = [process.cpu_times() for process in running]
    ended = server.launcher.cpu_times()
    return sum(of.user + of.system for of in times) + ended.children_user + ended.children_system


def drop(files: list[Path]) -> None:
    for file in files:
        with file.open("rb") as opened:
            os.fdatasync(opened.fileno())  # a page that is not on the disk yet cannot be dropped
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if (share := resident_share(file)) > 0.01:
            sys.exit(f"{share:.0%} of {file} stay in the page cache: some process has it mapped.")


def resident_share(file: Path) -> float:
    """How much of a file is in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, mmap.MAP_PRIVATE) as mapped:
        num_pages = -(-len(mapped) // mmap.PAGESIZE)
        pages = (ctypes.c_ubyte * num_pages)()
        view = (ctypes.c_char * len(mapped)).from_buffer(mapped)
        failed = libc.mincore(ctypes.byref(view), ctypes.c_size_t(len(mapped)), pages)
        del view  # the map cannot be closed before
        if failed:
            raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in pages) / num_pages


def read_plainly(files: list[Path]) -> float:
    """Seconds to read them through a buffer that is used again and again."""
    buffer = bytearray(BUFFER_BYTES)
    began_at = time.monotonic()
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return time.monotonic() - began_at


def wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if not server.launcher.is_running():
            sys.exit(f"The server ended:\n{server.log.read_text()}")
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.05)
    sys.exit(f"The server was not ready within {START_TIMEOUT_S:g} s:\n{server.log.read_text()}")


def read_log(lines: list[dict[str, Any]], began: float) -> tuple[float, dict[str, float]]:
    """How long the weights took, and each phase, in seconds. began: time of day."""
    loading_s, phases, before = 0.0, {}, began
    for phase, words in PHASES.items():
        line = next(line for line in lines if words in _message(line))
        at = datetime.fromisoformat(line["timestamp"].replace("Z", "+00:00")).timestamp()
        if words == "Loaded ":
            found = re.search(r"in ([\d.]+) s", _message(line))
            assert found is not None
            loading_s = float(found.group(1))
            before += loading_s
        phases[phase] = at - before
        before = at
    return loading_s, phases


def _message(line: dict[str, Any]) -> str:
    return str(line.get("message") or line["fields"]["message"])


def _line(start: Start) -> str:
    return (
        f"{'cold' if start.is_cold else 'warm'}: ready after {start.total_s:.1f} s, of which its processes "
        f"computed {start.cpu_s:.1f} s; weights in "
        f"{start.loading_s:.1f} s, read plainly in {start.plain_read_s:.2f} s; load average "
        f"{start.load_average:.1f}"
    )


def describe(starts: list[Start]) -> str:
    """Medians, cold and warm."""
    both = [[start for start in starts if start.is_cold is is_cold] for is_cold in (True, False)]
    rows = [("launcher start to ready, s", [_median(start.total_s for start in of) for of in both])]
    rows.append(("  of it: reading weights, s", [_median(start.loading_s for start in of) for of in both]))
    for phase in PHASES:
        rows.append((f"  {phase}, s", [_median(start.phases[phase] for start in of) for of in both]))
    rows += [
        ("CPU time of all its processes, s", [_median(start.cpu_s for start in of) for of in both]),
        (
            "weights, GB/s",
            [_median(start.num_bytes / 1e9 / start.loading_s for start in of) for of in both],
        ),
        (
            "the same files read plainly, GB/s",
            [_median(start.num_bytes / 1e9 / start.plain_read_s for start in of) for of in both],
        ),
        ("load average", [_median(start.load_average for start in of) for of in both]),
    ]
    lines = ["", "| median | cold | warm |", "|---|---:|---:|"]
    return "\n".join(lines + [f"| {title} | {cold:.2f} | {warm:.2f} |" for title, (cold, warm) in rows])


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


if __name__ == "__main__":
    main()
