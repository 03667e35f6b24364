"""How fast /health answers while the server is as busy as it can be: streams, and a prompt of 30,000 tokens.

    python bench/health.py

Starts the launcher with a small random model of its own that takes long prompts. Three situations, one after
the other: nothing else; `--streams` streams; the same while one prompt of `--prompt-tokens` tokens after the
other is prefilled, chunk by chunk. A process of its own asks /health `--rate` times a second, always on the
connection that it keeps, and beside it a bare responder: a server that does nothing but answer, on the same
event loop, in another process. What the bare one takes is the share of the machine and of the prober.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path

import aiohttp
import uvloop
from soak import free_port, serving, wait_until_ready

NUM_WORDS = 1000
STREAM_TOKENS = 400
MAX_TOTAL_TOKENS = 36_000

BARE_REPLY = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Probe:
    what: str  # "health" or "bare"
    asked_at: float  # time.monotonic()
    took_ms: float


# The processes beside the server


class BareResponder(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, _: bytes) -> None:
        self._transport.write(BARE_REPLY)  # type: ignore[attr-defined]  # uvloop's derive from nothing


def serve_bare(port: int) -> None:
    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(BareResponder, "127.0.0.1", port)
        await server.serve_forever()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())


def probe(ports: dict[str, int], rate: float, probes: "Queue[Probe]") -> None:
    """Both in turns, until it is terminated."""
    connections = {
        what: http.client.HTTPConnection("127.0.0.1", port, timeout=60) for what, port in ports.items()
    }
    next_at = time.monotonic()
    while True:
        for what, connection in connections.items():
            next_at += 1 / rate / len(connections)
            time.sleep(max(0.0, next_at - time.monotonic()))
            asked_at = time.monotonic()
            connection.request("GET", "/health")
            reply = connection.getresponse()
            reply.read()
            took_ms = (time.monotonic() - asked_at) * 1000
            if reply.status != 200:
                raise SystemExit(f"/health answered {reply.status}")
            probes.put(Probe(what, asked_at, took_ms))


@contextlib.contextmanager
def background(target: object, *arguments: object) -> Iterator[None]:
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join(30)


# The model


def make_model(folder: Path) -> None:
    """A Llama small enough for its attention over 30,000 tokens, with a token for each of its words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=NUM_WORDS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1 << 16,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {f"w{number}": number for number in range(NUM_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def prompt_of(num_tokens: int, seed: int) -> str:
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(NUM_WORDS)}" for _ in range(num_tokens))


# The load


async def load(url: str, num_streams: int, prompt_tokens: int, seconds: float) -> tuple[int, int]:
    """Returns how many tokens the streams got, and how many prompts were prefilled."""
    until = time.monotonic() + seconds
    num_tokens = num_prompts = 0

    async def stream(session: aiohttp.ClientSession, number: int) -> None:
        nonlocal num_tokens
        body = {
            "inputs": prompt_of(8, number),
            "parameters": {"max_new_tokens": STREAM_TOKENS, "do_sample": True},
        }
        while time.monotonic() < until:
            async with session.post("/generate_stream", json=body) as response:
                response.raise_for_status()
                async for data in response.content.iter_any():
                    num_tokens += data.count(b"data:")
                    if time.monotonic() > until:
                        break

    async def prompts(session: aiohttp.ClientSession) -> None:
        nonlocal num_prompts
        while prompt_tokens and time.monotonic() < until:
            body = {
                "inputs": prompt_of(prompt_tokens, 1000 + num_prompts),
                "parameters": {"max_new_tokens": 1},
            }
            with contextlib.suppress(TimeoutError):
                async with (
                    asyncio.timeout(max(0.1, until - time.monotonic())),
                    session.post("/generate", json=body) as response,
                ):
                    response.raise_for_status()
                    num_prompts += 1

    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        streams = (stream(session, number) for number in range(num_streams))
        await asyncio.gather(*streams, prompts(session), asyncio.sleep(seconds))
    return num_tokens, num_prompts


def percentiles(took_ms: list[float]) -> str:
    ordered = sorted(took_ms)

    def at(share: float) -> float:
        return ordered[min(int(len(ordered) * share), len(ordered) - 1)]

    return f"{len(ordered)} | {at(0.5):.2f} | {at(0.99):.2f} | {ordered[-1]:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=30_000)
    parser.add_argument("--rate", type=float, default=20.0, help="probes a second, of each kind")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each situation")
    arguments = parser.parse_args()
    situations = {
        "idle": (0, 0),
        "streams": (arguments.streams, 0),
        "streams and long prompts": (arguments.streams, arguments.prompt_tokens),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder)
        probes: Queue[Probe] = multiprocessing.get_context("spawn").Queue()
        bare_port = free_port()
        limits = {
            "--max-total-tokens": MAX_TOTAL_TOKENS,
            "--max-input-tokens": MAX_TOTAL_TOKENS - 1,
            "--max-concurrent-requests": arguments.streams + 8,
            "--max-batch-prefill-tokens": 2048,
        }
        options = [str(word) for option in limits.items() for word in option]
        with serving(str(folder), options) as server, background(serve_bare, bare_port):
            asyncio.run(wait_until_ready(server))
            time.sleep(2)
            print(f"load average {os.getloadavg()[0]:.1f}")
            print(
                "| situation | answered by | probes | p50 ms | p99 ms | max ms |\n|---|---|---|---|---|---|"
            )
            ports = {"health": int(server.url.rpartition(":")[2]), "bare": bare_port}
            with background(probe, ports, arguments.rate, probes):
                for situation, (num_streams, prompt_tokens) in situations.items():
                    began_at = time.monotonic()
                    done = asyncio.run(load(server.url, num_streams, prompt_tokens, arguments.seconds))
                    seen: dict[str, list[float]] = {"health": [], "bare": []}
                    while not probes.empty():
                        one = probes.get()
                        if one.asked_at > began_at + 1:  # the streams are under way
                            seen[one.what].append(one.took_ms)
                    for what, took_ms in seen.items():
                        print(f"| {situation} | {what} | {percentiles(took_ms)} |", flush=True)
                    print(f"(tokens streamed, prompts answered: {done})", flush=True)


if __name__ == "__main__":
    main()
