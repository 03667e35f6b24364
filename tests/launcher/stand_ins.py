"""Launchers run for real, with small stand-ins for the commands that they start.

The launcher looks for its executables beside its own Python first. So the tests give it a virtual environment
of their own: the real one's packages, and a `bin` with the stand-ins in it. What a stand-in was started with,
it writes into the folder STAND_IN_DIR; how it behaves, it reads there (`behaviour.json`) at each start.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import grpc

import tgi_proto

T = TypeVar("T")

SPEAKING = {  # behaviour: shards that answer, with no step under way, and a router that answers
    "python_path": [str(Path(package.__path__[0]).parent) for package in (grpc, tgi_proto)],
    "health": {"last_step_id": 7},
    "router_answers": True,
}

COMMON = """
import json, os, signal, socket, subprocess, sys, threading, time
folder = os.environ["STAND_IN_DIR"]
with open(os.path.join(folder, "behaviour.json")) as file:
    behaviour = json.load(file)

def note(kind, **facts):
    facts |= {"kind": kind, "pid": os.getpid(), "time": time.time()}
    name = os.path.join(folder, f"{time.time_ns()}-{os.getpid()}")
    with open(name + ".part", "w") as file:
        json.dump(facts, file)
    os.rename(name + ".part", name + ".json")

def log(text, level="INFO"):
    print(json.dumps({"text": text, "record": {"level": {"name": level}}}), flush=True)

def wait_for_sigterm(ignore):
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    while ignore or not asked:
        time.sleep(0.02)
"""

SERVER = (
    COMMON
    + """
if sys.argv[1] == "download-weights":
    note("download", argv=sys.argv[1:], env=dict(os.environ))
    log("Download file: model.safetensors")
    time.sleep(behaviour.get("download_s", 0))
    if behaviour.get("download_fails"):
        print("no such repository", file=sys.stderr)
        sys.exit(1)
    print("noise that is no JSON")
    print(json.dumps({"model_path": os.path.join(folder, "model")}), end="", flush=True)
    sys.exit(0)

rank = int(os.environ["RANK"])
if "--standby" in sys.argv:
    note("standby", rank=rank)
    if behaviour.get("standbys_fail"):
        print("no module named torch", file=sys.stderr)
        sys.exit(4)
    time.sleep(behaviour.get("import_s", 0))
    line = sys.stdin.readline()
    if not line:
        note("standby-ended")
        sys.exit(0)
    os.environ |= json.loads(line)
    with open(os.path.join(folder, "behaviour.json")) as file:
        behaviour = json.load(file)
grandchild = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
hidden = None
if behaviour.get("escaping_grandchild"):
    hidden = subprocess.Popen(
        [sys.executable, "-S", "-c", "import time; time.sleep(5)"], start_new_session=True
    ).pid
note("shard", rank=rank, argv=sys.argv[1:], env=dict(os.environ), grandchild=grandchild.pid, hidden=hidden)
log(f"shard {rank} loads")
if rank in behaviour.get("shards_that_fail", []):
    print(f"rank {rank}: no such tensor", file=sys.stderr)
    sys.exit(3)
time.sleep(behaviour.get("load_s", 0))
if size := behaviour.get("long_line"):
    line = json.dumps({"text": "x" * size, "record": {"level": {"name": "INFO"}}}) + "\\n"
    for start in range(0, len(line), 10007):
        os.write(1, line[start : start + 10007].encode())
        time.sleep(0.002)
path = sys.argv[sys.argv.index("--uds-path") + 1] + f"-{rank}"
if behaviour.get("health") is not None:
    sys.path[:0] = behaviour["python_path"]
    import grpc
    from concurrent.futures import ThreadPoolExecutor
    from tgi_proto import generate_pb2, generate_pb2_grpc

    class Service(generate_pb2_grpc.TextGenerationServicer):
        def Health(self, request, context):
            with open(os.path.join(folder, "behaviour.json")) as file:
                return generate_pb2.HealthResponse(**json.load(file)["health"])

    server = grpc.server(ThreadPoolExecutor(2))
    generate_pb2_grpc.add_TextGenerationServicer_to_server(Service(), server)
    server.add_insecure_port("unix:" + path)
    server.start()
else:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
if (crash_s := behaviour.get("shards_crash_after_s")) is not None:
    time.sleep(crash_s)
    print("CUDA error: out of patience", file=sys.stderr)
    sys.exit(5)
wait_for_sigterm(behaviour.get("shards_ignore_sigterm"))
note("shard-ended", rank=rank)
"""
)

ROUTER = (
    COMMON
    + """
note("router", argv=sys.argv[1:], env=dict(os.environ))
print("the router's own line, verbatim", flush=True)
if behaviour.get("router_fails"):
    print("tokenizer is broken", file=sys.stderr)
    sys.exit(1)
time.sleep(behaviour.get("warmup_s", 0))
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])))
listener.listen(64)

def answer():
    while True:
        connection, _ = listener.accept()
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 503 Service Unavailable\\r\\ncontent-length: 0\\r\\n\\r\\n")
        connection.close()

if behaviour.get("router_answers"):
    threading.Thread(target=answer, daemon=True).start()
wait_for_sigterm(behaviour.get("router_ignores_sigterm"))
time.sleep(behaviour.get("drain_s", 0.1))
note("router-ended")
"""
)


def make_environment(folder: Path) -> Path:
    """A virtual environment with the stand-ins in its bin; returns its Python."""
    ours = Path(sys.prefix)
    (folder / "bin").mkdir(parents=True)
    shutil.copy(ours / "pyvenv.cfg", folder / "pyvenv.cfg")
    (folder / "lib").symlink_to(ours / "lib")
    python = folder / "bin" / "python"
    python.symlink_to(Path(sys.executable).resolve())
    for name, code in (("text-generation-server", SERVER), ("text-generation-router", ROUTER)):
        script = folder / "bin" / name
        script.write_text(f"#!{Path(sys.executable).resolve()} -SE\n{code}")
        script.chmod(0o755)
    return python


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_running(pid: int) -> bool:
    """False also for a zombie, which only waits for somebody to ask how it ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def eventually(read: Callable[[], T], timeout_s: float = 30.0) -> T:
    """The first true value of `read`."""
    deadline = time.monotonic() + timeout_s
    while not (value := read()):
        assert time.monotonic() < deadline, "this did not come true in time"
        time.sleep(0.02)
    return value


@dataclasses.dataclass
class Launched:
    process: subprocess.Popen[str]
    folder: Path  # STAND_IN_DIR
    port: int

    @property
    def log(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def behave(self, **behaviour: Any) -> None:
        """How stand-ins behave that are started from now on."""
        part = self.folder / "behaviour.part"
        part.write_text(json.dumps(behaviour))
        part.rename(self.folder / "behaviour.json")

    def notes(self, kind: str) -> list[dict[str, Any]]:
        """What the stand-ins of a kind wrote, oldest first."""
        notes = [json.loads(path.read_text()) for path in sorted(self.folder.glob("[0-9]*.json"))]
        return [note for note in notes if note["kind"] == kind]

    def pids(self, kind: str) -> list[int]:
        return [note["pid"] for note in self.notes(kind)]

    def everybody(self) -> list[int]:
        """Every process that was ever started below the launcher."""
        kinds = ("download", "standby", "shard", "router")
        started = list(dict.fromkeys(pid for kind in kinds for pid in self.pids(kind)))
        return started + [note["grandchild"] for note in self.notes("shard")]

    def until_serving(self, num_starts: int = 1) -> None:
        """Until the router has answered the launcher, for the `num_starts`-th time."""
        ready = "Webserver ready in"
        eventually(lambda: self.log.count(ready) >= num_starts or self.process.poll() is not None)
        assert self.process.poll() is None, self.log + self.stderr
        assert self.answers()

    def answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)

    def socket_path(self) -> Path:
        argv = self.notes("shard")[0]["argv"]
        return Path(argv[argv.index("--uds-path") + 1] + "-0")


@contextlib.contextmanager
def launched(
    python: Path, folder: Path, *arguments: str, env: dict[str, str] | None = None, **behaviour: Any
) -> Iterator[Launched]:
    """A launcher in the background; whatever happens, nothing of it is left afterwards."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    environ = {name: value for name, value in os.environ.items() if name not in ("HOSTNAME", "PORT")}
    environ |= {"STAND_IN_DIR": str(folder)} | (env or {})
    server = Launched(None, folder, port)  # type: ignore[arg-type]  # the process comes after its behaviour
    server.behave(**behaviour)
    (folder / "model").mkdir(exist_ok=True)
    with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as err:
        server.process = subprocess.Popen(
            [
                *(python, "-m", "tgi_launcher.main", "--model-id", str(folder / "model")),
                *("--port", str(port), "--hostname", "127.0.0.1", *arguments),
            ],
            stdout=out,
            stderr=err,
            env=environ,
            text=True,
        )
    try:
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.process.kill()
        server.process.wait()
        eventually(lambda: not any(map(is_running, server.everybody())))
