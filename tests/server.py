"""A whole server as a user starts it: the launcher's process, and what a test asks of it over HTTP."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

START_TIMEOUT_S = 120.0  # generous: the machine may be busy with other tests
REQUEST_TIMEOUT_S = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """`text-generation-launcher` with free ports and private sockets; use as a context manager."""

    def __init__(self, model: str, folder: Path, *args: str, python_path: Path | None = None) -> None:
        """python_path: a folder whose modules its processes find before all others."""
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = folder / "server.log"
        self.command = [
            str(Path(sys.executable).with_name("text-generation-launcher")),
            *("--model-id", model),
            *("--hostname", "127.0.0.1"),
            *("--port", str(self.port)),
            *("--prometheus-port", str(free_port())),
            *("--shard-uds-path", str(folder / "shard")),
            *("--master-port", str(free_port())),
            *args,
        ]
        self.environ = dict(os.environ)
        if python_path is not None:
            folders = [str(python_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
            self.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
        self.client = httpx.Client(base_url=self.url, timeout=REQUEST_TIMEOUT_S)

    def __enter__(self) -> "Server":
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environ, stdout=log, stderr=subprocess.STDOUT
            )
        self.launcher = psutil.Process(self.process.pid)
        try:
            self.wait_until_healthy()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        family = self.family()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
        _, alive = psutil.wait_procs(family, timeout=10)
        for process in alive:
            process.kill()
        assert not alive, f"left behind: {alive}\n{self.log()}"

    # Its processes

    def family(self) -> list[psutil.Process]:
        """The launcher and all that it started."""
        try:
            return [self.launcher, *self.launcher.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def pids(self, word: str) -> list[int]:
        """Of the launcher's children whose command line contains `word`, in the order of their ranks."""
        found = [
            child for child in self.launcher.children(recursive=True) if word in " ".join(child.cmdline())
        ]
        return [child.pid for child in sorted(found, key=lambda child: int(child.environ().get("RANK", 0)))]

    @property
    def shard_pids(self) -> list[int]:
        """Of those that serve, by rank: they hold the sockets. The processes that stand by do not."""
        pids = {}
        for child in self.launcher.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                pids |= {Path(str(held.laddr)): child.pid for held in child.net_connections("unix")}
        return [pid for path, pid in sorted(pids.items()) if path.match(str(self.folder / "shard-*"))]

    @property
    def standby_pids(self) -> list[int]:
        """Of those that wait to become a shard, by rank."""
        serving = self.shard_pids
        return [pid for pid in self.pids("--standby") if pid not in serving]

    @property
    def router_pid(self) -> int:
        return self.pids("text-generation-router")[0]

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait_until_healthy(self, timeout_s: float = START_TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the launcher exited with {self.process.returncode}\n{self.log()}")
            if self.is_healthy():
                return
            time.sleep(0.1)
        raise AssertionError(f"not healthy after {timeout_s} s\n{self.log()}")

    def is_healthy(self) -> bool:
        try:
            return self.client.get("/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    # Requests

    def generate(self, prompt: str, **parameters: Any) -> dict[str, Any]:
        """The body of /generate, with details. Greedy unless the parameters say otherwise."""
        body = {"inputs": prompt, "parameters": {"details": True, **parameters}}
        response = self.client.post("/generate", json=body)
        assert response.status_code == 200, response.text
        return dict(response.json())

    def text(self, prompt: str, **parameters: Any) -> str:
        return str(self.generate(prompt, **parameters)["generated_text"])

    def stream(self, prompt: str, **parameters: Any) -> Iterator[dict[str, Any]]:
        """The events of /generate_stream."""
        body = {"inputs": prompt, "parameters": {"details": True, **parameters}}
        with self.client.stream("POST", "/generate_stream", json=body) as response:
            assert response.status_code == 200
            for line in response.iter_lines():
                if line.startswith("data:"):
                    event = json.loads(line.removeprefix("data:"))
                    assert "error" not in event, event
                    yield event

    def metric(self, name: str) -> float:
        for line in self.client.get("/metrics").text.splitlines():
            if line.split(" ")[0] == name:
                return float(line.split(" ")[1])
        raise KeyError(name)

    def wait_for_metric(self, name: str, value: float, timeout_s: float = 10.0) -> None:
        deadline = time.monotonic() + timeout_s
        while self.metric(name) != value:
            assert time.monotonic() < deadline, f"{name} is {self.metric(name)}, expected {value}"
            time.sleep(0.05)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
