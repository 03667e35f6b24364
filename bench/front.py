"""What a streamed token costs the router: CPU time of its process, with the model taken out.

    python bench/front.py                       # 1, 32 and 256 connections on each streaming route
    python bench/front.py --awake               # to a client that never sleeps: the kernel need not wake it
    python bench/front.py --profile front.prof  # the same under cProfile; read it with `python -m pstats`

A real router process serves real connections; behind it stands a shard that replays a recorded answer, one
token a step for every sequence, and computes nothing. The time is the router's alone (user and system, as the
operating system counts them), between the first token of the last connection and the end of the first:
everybody streams. The goal is 20 µs a token at 256 connections.

The row "bare" is the floor: a server on the same event loop that does nothing but write the same number of
bytes to as many connections, as often.
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import random
import socket
import struct
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import psutil
import uvloop
from grpc import aio
from tokenizers import Tokenizer

from tgi_proto import generate_pb2 as pb
from tgi_proto import generate_pb2_grpc as pb_grpc

DEMO_MODEL = Path(__file__).parents[1] / "demo/tgi_demo/model"
TEXT = "The server reads a request, asks the model for one token after another, and sends each as it comes. "
PATHS = {
    "generate": ("/generate_stream", '{"inputs":"Count.","parameters":{"max_new_tokens":%d}}'),
    "completions": ("/v1/completions", '{"prompt":"Count.","stream":true,"max_tokens":%d}'),
    "chat": (
        "/v1/chat/completions",
        '{"messages":[{"role":"user","content":"Count."}],"stream":true,"max_tokens":%d}',
    ),
}
BARE = "bare"  # the floor's name among the routes
EVENT_BYTES = 130  # of the native route's event for one token, framed as a chunk
START_TIMEOUT_S = 60.0
MAX_SEQUENCES = 512
NUM_LOGPROBS = 1009  # prime: each token meets all of them


class Replay(pb_grpc.TextGenerationServicer):
    """A shard whose sequences all say the recorded tokens, over and over."""

    def __init__(self, token_ids: list[int], vocab_size: int, step_s: float) -> None:
        self.token_ids = token_ids
        self.vocab_size = vocab_size
        self.step_s = step_s
        draw = random.Random(0)
        self.logprobs = [
            struct.unpack("f", struct.pack("f", -draw.expovariate(1.0)))[0] for _ in range(NUM_LOGPROBS)
        ]

    async def Info(self, request: pb.InfoRequest, context: object) -> pb.InfoResponse:
        return pb.InfoResponse(
            model_type="llama", dtype="float32", device_type="cpu", vocab_size=self.vocab_size, world_size=1
        )

    async def Health(self, request: pb.HealthRequest, context: object) -> pb.HealthResponse:
        return pb.HealthResponse()

    async def Warmup(self, request: pb.WarmupRequest, context: object) -> pb.WarmupResponse:
        return pb.WarmupResponse(num_blocks=1 << 20, block_size=16, max_total_tokens=1 << 16)

    async def Run(
        self, requests: AsyncIterator[pb.RunRequest], context: object
    ) -> AsyncIterator[pb.StepResult]:
        num_pending: dict[int, int] = {}  # known tokens without KV
        num_said: dict[int, int] = {}
        async for request in requests:
            plan = request.plan
            began_at = time.monotonic()
            for sequence_id in plan.drop_sequence_ids:
                del num_pending[sequence_id], num_said[sequence_id]
            for added in plan.add:
                num_known = len(added.prompt_token_ids) + len(added.output_token_ids)
                num_pending[added.sequence_id] = num_known - added.num_cached_tokens
                num_said[added.sequence_id] = len(added.output_token_ids)
            result = pb.StepResult(step_id=plan.step_id)
            for sequence_id, num_tokens in zip(plan.run_sequence_ids, plan.run_num_tokens, strict=True):
                num_pending[sequence_id] -= num_tokens
                if num_pending[sequence_id] == 0:
                    num_pending[sequence_id] = 1
                    result.sequence_ids.append(sequence_id)
                    result.token_ids.append(self.token_ids[num_said[sequence_id] % len(self.token_ids)])
                    result.logprobs.append(
                        self.logprobs[(num_said[sequence_id] + sequence_id) % NUM_LOGPROBS]
                    )
                    num_said[sequence_id] += 1
            await asyncio.sleep(max(0.0, self.step_s - (time.monotonic() - began_at)))
            yield result


def serve_shard(address: str, token_ids: list[int], vocab_size: int, step_s: float) -> None:
    """A process of its own, until it is terminated."""

    async def serve() -> None:
        server = aio.server()
        pb_grpc.add_TextGenerationServicer_to_server(Replay(token_ids, vocab_size, step_s), server)
        server.add_insecure_port(address)
        await server.start()
        await server.wait_for_termination()

    asyncio.run(serve())


class BareStream(asyncio.Protocol):
    """Answers whatever it is asked with so many chunks, one a step."""

    def __init__(self, connections: "set[BareStream]", num_tokens: int) -> None:
        self.num_left = num_tokens
        self.transport: asyncio.Transport | None = None
        self._connections = connections

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's derive from nothing

    def data_received(self, _: bytes) -> None:
        assert self.transport is not None
        self.transport.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        self._connections.add(self)


def serve_bare(port: int, num_tokens: int, step_s: float) -> None:
    """A process of its own, until it is terminated."""

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        connections: set[BareStream] = set()
        await loop.create_server(lambda: BareStream(connections, num_tokens), "127.0.0.1", port)
        event = b"data: ".ljust(EVENT_BYTES, b"x")
        while True:
            began_at = loop.time()
            for one in list(connections):
                assert one.transport is not None
                one.transport.write(event)
                one.num_left -= 1
                if one.num_left == 0:
                    connections.discard(one)
                    one.transport.close()
            await asyncio.sleep(max(0.0, step_s - (loop.time() - began_at)))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())


@contextlib.contextmanager
def running_bare(num_tokens: int, step_s: float) -> Iterator[tuple[psutil.Process, int]]:
    """The bare server's process and its port."""
    port = free_port()
    server = multiprocessing.get_context("spawn").Process(
        target=serve_bare, args=(port, num_tokens, step_s), daemon=True
    )
    server.start()
    assert server.pid is not None
    process = psutil.Process(server.pid)
    try:
        wait_for(port, process, None)
        yield process, port
    finally:
        server.terminate()
        server.join(30)


@contextlib.contextmanager
def running_router(step_s: float, profile: Path | None) -> Iterator[tuple[psutil.Process, int]]:
    """The router's process and its port."""
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    token_ids = tokenizer.encode(TEXT * 4, add_special_tokens=False).ids
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        uds_path = f"{folder}/shard-0"
        shard = multiprocessing.get_context("spawn").Process(
            target=serve_shard,
            args=(f"unix:{uds_path}", token_ids, tokenizer.get_vocab_size(), step_s),
            daemon=True,
        )
        shard.start()
        port = free_port()
        runner = [] if profile is None else ["-m", "cProfile", "-o", str(profile)]
        log = Path(f"{folder}/log")
        output = stack.enter_context(log.open("wb"))
        router = psutil.Popen(
            [
                *(sys.executable, *runner, str(Path(sys.executable).with_name("text-generation-router"))),
                *("--master-shard-uds-path", uds_path, "--tokenizer-name", str(DEMO_MODEL)),
                *("--hostname", "127.0.0.1", "--port", str(port), "--prometheus-port", str(port)),
                *("--max-concurrent-requests", str(MAX_SEQUENCES), "--max-batch-prefill-tokens", "16384"),
            ],
            stdout=output,
            stderr=output,
        )
        try:
            wait_for(port, router, log)
            yield router, port
        finally:
            router.terminate()
            router.wait(30)
            shard.terminate()
            shard.join(30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, server: psutil.Process, log: Path | None) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    sys.exit(f"the server did not start:\n{'' if log is None else log.read_text()}")


class Connection(asyncio.Protocol):
    """One streaming request: when it began, when it was over, how many frames came."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.num_frames = 0
        self.status = b""
        self.begun = asyncio.Event()
        self.over = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.status = self.status or data[9:12]
        num_frames = data.count(b"data:")
        self.num_frames += num_frames
        if num_frames:
            self.begun.set()

    def connection_lost(self, _: Exception | None) -> None:
        self.begun.set()
        self.over.set()


@dataclass(frozen=True, slots=True)
class Measured:
    num_tokens: int
    user_s: float  # CPU time of the server's process
    system_s: float
    wall_s: float

    @property
    def user_us(self) -> float:
        return self.user_s / self.num_tokens * 1e6

    @property
    def system_us(self) -> float:
        return self.system_s / self.num_tokens * 1e6

    @property
    def us_per_token(self) -> float:
        return self.user_us + self.system_us


async def measure(
    server: psutil.Process, port: int, route: str, concurrency: int, num_tokens: int, *, awake: bool = False
) -> Measured:
    path, template = PATHS.get(route, PATHS["generate"])
    body = template % num_tokens
    request = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}"
    ).encode()
    loop = asyncio.get_running_loop()
    connections = [Connection(request) for _ in range(concurrency)]
    transports = [
        (await loop.create_connection(lambda one=one: one, "127.0.0.1", port))[0]  # type: ignore[misc]
        for one in connections
    ]
    staying_awake = asyncio.create_task(stay_awake()) if awake else None
    await asyncio.gather(*(one.begun.wait() for one in connections))
    before, frames_before, began_at = (
        server.cpu_times(),
        [one.num_frames for one in connections],
        time.monotonic(),
    )
    await asyncio.wait(
        [asyncio.create_task(one.over.wait()) for one in connections], return_when="FIRST_COMPLETED"
    )
    after, ended_at = server.cpu_times(), time.monotonic()
    counted = sum(one.num_frames for one in connections) - sum(frames_before)
    await asyncio.gather(*(one.over.wait() for one in connections))
    if staying_awake is not None:
        staying_awake.cancel()
    for transport in transports:
        transport.close()
    if any(one.status != b"200" for one in connections):
        sys.exit(f"{path} answered {[one.status for one in connections if one.status != b'200'][:3]}")
    return Measured(counted, after.user - before.user, after.system - before.system, ended_at - began_at)


async def stay_awake() -> None:
    while True:  # noqa: ASYNC110  # there is nothing to wait for
        await asyncio.sleep(0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--routes", nargs="+", choices=[*PATHS, BARE], default=[*PATHS, BARE])
    parser.add_argument("--output-tokens", type=int, default=300, help="tokens of a stream")
    parser.add_argument("--step-ms", type=float, default=20.0, help="how long a step of the shard takes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--awake", action="store_true", help="the client never sleeps")
    parser.add_argument("--profile", type=Path, help="where the router's cProfile goes (it slows the router)")
    arguments = parser.parse_args()
    if max(arguments.concurrency) > MAX_SEQUENCES:
        parser.error(f"--concurrency must be <= {MAX_SEQUENCES}")
    step_s = arguments.step_ms / 1000
    with (
        running_router(step_s, arguments.profile) as router,
        running_bare(arguments.output_tokens, step_s) as bare,
    ):
        asyncio.run(measure(*router, "generate", 8, 50))  # warm
        print("| route | connections | µs a token, least | its user | its system | median | tokens/s |")
        print("|---|---|---|---|---|---|---|")
        for concurrency in arguments.concurrency:
            for route in arguments.routes:
                server = bare if route == BARE else router
                rounds = sorted(
                    (
                        asyncio.run(
                            measure(
                                *(*server, route, concurrency, arguments.output_tokens), awake=arguments.awake
                            )
                        )
                        for _ in range(arguments.rounds)
                    ),
                    key=lambda one: one.us_per_token,
                )
                least, median = rounds[0], rounds[len(rounds) // 2]
                print(
                    f"| {route} | {concurrency} | {least.us_per_token:.1f} | {least.user_us:.1f} "
                    f"| {least.system_us:.1f} | {median.us_per_token:.1f} "
                    f"| {median.num_tokens / median.wall_s:,.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
