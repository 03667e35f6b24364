"""Ranks of a shard as real processes, and a small gRPC client for them."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from tgi_proto import generate_pb2 as pb
from tgi_proto import generate_pb2_grpc as pb_grpc

READY_TIMEOUT_S = 60.0


@dataclass
class ShardProcess:
    process: subprocess.Popen[str]
    socket_path: Path
    log_path: Path

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(f"unix://{self.socket_path}")

    def wait_until_ready(self) -> None:
        """The socket is there and Info answers."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self._answers():
            assert self.process.poll() is None, self.log_path.read_text()
            assert time.monotonic() < deadline, self.log_path.read_text()
            time.sleep(0.05)

    def _answers(self) -> bool:
        if not self.socket_path.exists():
            return False
        with self.channel() as channel:
            try:
                pb_grpc.TextGenerationStub(channel).Info(pb.InfoRequest(), timeout=5)
            except grpc.RpcError:
                return False
        return True

    def wait_until_ended(self) -> None:
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


@contextmanager
def running(checkpoint: Path, folder: Path, *, world_size: int = 1) -> Iterator[list[ShardProcess]]:
    """`world_size` ranks that serve `checkpoint`, ready. Sockets and logs lie in `folder`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shards = []
    for rank in range(world_size):
        argv = [
            sys.executable,
            "-m",
            "tgi_shard.main",
            "serve",
            str(checkpoint),
            "--uds-path",
            str(folder / "s"),
        ]
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        log_path = folder / f"{rank}.log"
        with log_path.open("w") as log:
            process = subprocess.Popen(
                argv + ["--sharded"] * (world_size > 1),
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
        shards.append(ShardProcess(process, folder / f"s-{rank}", log_path))
    try:
        for shard in shards:
            shard.wait_until_ready()
        yield shards
    finally:
        for shard in shards:
            shard.process.send_signal(signal.SIGTERM)
        for shard in shards:
            shard.wait_until_ended()
