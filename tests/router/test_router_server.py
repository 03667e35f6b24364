"""The router as a process, in front of a scripted shard: start, signals, clients that leave, ports, logs."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

import tiny_tokenizers
from scripted_shard import ScriptedService, ScriptedShard, start_server
from tgi_router.main import main, settings_from

STEP_S = 0.01
FLAGS = (
    *("max-client-batch-size", "max-concurrent-requests", "max-best-of", "max-stop-sequences"),
    *("max-top-n-tokens", "max-batch-prefill-tokens", "waiting-served-ratio", "max-waiting-tokens"),
    *("validation-workers", "hostname", "port", "prometheus-port", "master-shard-uds-path", "tokenizer-name"),
    *("payload-limit", "usage-stats", "otlp-service-name", "max-input-tokens", "max-total-tokens"),
    *("max-batch-total-tokens", "max-batch-size", "revision", "trust-remote-code", "json-output"),
    *("tokenizer-config-path", "disable-grammar-support", "otlp-endpoint", "cors-allow-origin", "api-key"),
    *("max-image-fetch-size", "served-model-name", "enable-prefill-logprobs", "prefix-caching"),
    "max-queue-time",
)
BODY = {"inputs": "the one", "parameters": {"max_new_tokens": 60}}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Router:
    def __init__(self, folder: Path, *args: str, **environ: str) -> None:
        self.port, self.prometheus_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = folder / "router.log"
        command = [
            *(sys.executable, "-c", "from tgi_router.main import main; main()"),
            *("--hostname", "127.0.0.1", "--port", str(self.port)),
            *("--prometheus-port", str(self.prometheus_port)),
            *("--master-shard-uds-path", str(folder / "shard-0")),
            *("--tokenizer-name", str(folder)),
            *("--json-output", *args),
        ]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | environ
            )

    async def ready(self) -> None:
        async with httpx.AsyncClient() as client:
            for _ in range(600):
                assert self.process.poll() is None, self.log()
                try:
                    await client.get(f"{self.url}/health")
                except httpx.ConnectError:
                    await asyncio.sleep(0.05)
                else:
                    return
        raise AssertionError(self.log())

    async def exit_code(self, timeout_s: float = 20.0) -> int:
        return await asyncio.to_thread(self.process.wait, timeout_s)

    def log(self) -> str:
        return self.log_path.read_text()

    def messages(self) -> list[str]:
        return [json.loads(line)["message"] for line in self.log().splitlines()]


@asynccontextmanager
async def serving(
    folder: Path, *args: str, step_s: float = STEP_S, **environ: str
) -> AsyncIterator[tuple[Router, Any]]:
    tiny_tokenizers.save(folder)
    shard = ScriptedShard(vocab_size=tiny_tokenizers.VOCAB_SIZE, num_blocks=256)
    server = await start_server(ScriptedService(shard, step_s), f"unix:{folder}/shard-0")
    router = Router(folder, *args, **environ)
    try:
        await router.ready()
        yield router, server
    finally:
        if router.process.poll() is None:
            router.process.kill()
        router.process.wait()
        await server.stop(None)


async def collect(lines: AsyncIterator[str]) -> list[Any]:
    return [json.loads(line.removeprefix("data: ")) async for line in lines if line]


async def metric(client: httpx.AsyncClient, url: str, name: str) -> float:
    for line in (await client.get(f"{url}/metrics")).text.splitlines():
        if line.startswith(f"{name} "):
            return float(line.split()[1])
    return 0.0


async def test_streams_limits_and_metrics(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, "--payload-limit", "50000") as (router, _),
        httpx.AsyncClient(timeout=20) as client,
    ):
        loop = asyncio.get_running_loop()
        arrived = []
        async with client.stream("POST", f"{router.url}/generate_stream", json=BODY) as response:
            assert "server" not in response.headers
            async for line in response.aiter_lines():
                if line:
                    arrived.append(loop.time())
        assert len(arrived) == 60
        assert arrived[-1] - arrived[0] > 30 * STEP_S  # they come as they are made

        response = await client.post(
            f"{router.url}/generate", content=b"x" * 400_000, headers={"content-type": "application/json"}
        )
        assert (response.status_code, response.text) == (
            413,
            "Failed to buffer the request body: length limit exceeded",
        )

        head = await client.head(f"{router.url}/health")
        assert (head.status_code, head.content) == (200, b"")

        # A client that leaves takes its sequence along.
        async with client.stream("POST", f"{router.url}/generate_stream", json=BODY) as response:
            await response.aiter_lines().__anext__()
        num_requests = await metric(client, router.url, "tgi_request_count")
        waiting = asyncio.create_task(client.post(f"{router.url}/generate", json=BODY))
        while await metric(client, router.url, "tgi_request_count") == num_requests:  # noqa: ASYNC110  # polled
            await asyncio.sleep(STEP_S / 4)
        waiting.cancel()
        for _ in range(100):
            if await metric(client, router.url, 'tgi_request_failure{err="dropped"}') == 2:
                break
            await asyncio.sleep(0.05)
        else:
            raise AssertionError(router.log())
        assert await metric(client, router.url, "tgi_batch_current_size") == 0
        assert await metric(client, f"http://127.0.0.1:{router.prometheus_port}", "tgi_request_success") == 1
        assert (await client.get(f"http://127.0.0.1:{router.prometheus_port}/info")).status_code == 404
        for line in router.log().splitlines():
            assert {"timestamp", "level", "message", "target", "filename", "line_number"} <= set(
                json.loads(line)
            )
        assert router.messages().count("Success") == 1
        assert "Connected" in router.messages()

        router.process.send_signal(signal.SIGTERM)
        assert await router.exit_code() == 0


async def test_sigterm_finishes_open_streams_and_refuses_new_ones(tmp_path: Path) -> None:
    async with serving(tmp_path) as (router, _), httpx.AsyncClient(timeout=20) as client:
        async with client.stream("POST", f"{router.url}/generate_stream", json=BODY) as response:
            lines = response.aiter_lines()
            await lines.__anext__()
            router.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(5 * STEP_S)
            refused = await client.post(f"{router.url}/generate", json=BODY)
            assert refused.status_code == 503
            assert refused.json() == {"error": "Server is shutting down", "error_type": "overloaded"}
            assert (await client.get(f"{router.url}/health")).status_code == 503
            events = await collect(lines)
        assert len(events) == 59
        assert events[-1]["generated_text"]
        assert await router.exit_code() == 0
        with pytest.raises(httpx.ConnectError):
            await client.get(f"{router.url}/health")
        assert "signal received, starting graceful shutdown" in router.messages()


async def test_the_api_key_is_not_logged(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, API_KEY="open-sesame", LOG_LEVEL="trace") as (router, _),
        httpx.AsyncClient(timeout=20) as client,
    ):
        for key, status in (("open-sesame", 200), ("open-sesame-please", 401)):
            headers = {"authorization": f"Bearer {key}"}
            reply = await client.post(f"{router.url}/generate", json=BODY, headers=headers)
            assert reply.status_code == status
        # Nor where something goes wrong with its header at hand.
        headers = {"authorization": "Bearer open-sesame", "content-type": "application/json"}
        assert (await client.post(f"{router.url}/generate", content=b"{", headers=headers)).status_code == 400
        router.process.send_signal(signal.SIGTERM)
        assert await router.exit_code() == 0
        assert "Success" in router.messages()
        assert "open-sesame" not in router.log()


def test_settings_do_not_show_the_api_key() -> None:
    options = main.make_context("text-generation-router", ["--api-key", "open-sesame"]).params
    assert "open-sesame" not in repr(settings_from(options))


async def test_a_second_signal_is_immediate(tmp_path: Path) -> None:
    async with serving(tmp_path, step_s=0.3) as (router, _), httpx.AsyncClient(timeout=20) as client:
        loop = asyncio.get_running_loop()
        started = loop.time()
        async with client.stream("POST", f"{router.url}/generate_stream", json=BODY) as response:
            await response.aiter_lines().__anext__()
            router.process.send_signal(signal.SIGINT)
            await asyncio.sleep(0.2)
            assert router.process.poll() is None
            router.process.send_signal(signal.SIGTERM)
            await router.exit_code(5)
        assert loop.time() - started < 10


async def test_sigterm_while_the_shards_are_away_fails_what_is_open(tmp_path: Path) -> None:
    async with serving(tmp_path) as (router, server), httpx.AsyncClient(timeout=20) as client:
        waiting = asyncio.create_task(client.post(f"{router.url}/generate", json=BODY))
        await asyncio.sleep(10 * STEP_S)
        await server.stop(None)
        for _ in range(100):
            if (await client.get(f"{router.url}/health")).status_code == 503:
                break
            await asyncio.sleep(0.05)
        router.process.send_signal(signal.SIGTERM)
        response = await waiting
        assert response.status_code == 503
        assert response.json()["error_type"] == "generation"
        assert response.json()["error"].startswith("Request failed during generation: Server error: ")
        assert await router.exit_code() == 0


async def test_sigterm_before_the_shards_are_there(tmp_path: Path) -> None:
    tiny_tokenizers.save(tmp_path)
    router = Router(tmp_path)
    try:
        while "Waiting for the shards" not in router.log():
            assert router.process.poll() is None, router.log()
            await asyncio.sleep(0.05)
        async with httpx.AsyncClient() as client:
            with pytest.raises(httpx.ConnectError):
                await client.get(f"{router.url}/health")
        assert router.process.poll() is None
        router.process.send_signal(signal.SIGTERM)
        assert await router.exit_code() == 0
    finally:
        router.process.kill()
        router.process.wait()


async def test_a_busy_port_ends_the_start_and_a_busy_metrics_port_does_not(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        async with serving(tmp_path, "--prometheus-port", port) as (router, _):
            assert any("main port alone" in message for message in router.messages())
            other = Router(
                tmp_path / "..",
                "--port",
                port,
                "--tokenizer-name",
                str(tmp_path),
                "--master-shard-uds-path",
                str(tmp_path / "shard-0"),
            )
            assert await other.exit_code() == 1
            assert f"Failed to bind to 127.0.0.1:{port}: " in other.log()


async def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    router = Router(tmp_path)
    assert await router.exit_code() == 1
    assert "has no tokenizer.json" in router.log()


def test_help_tells_every_option_with_its_variable() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    for flag in FLAGS:
        assert f"--{flag}" in result.output
        assert flag.replace("-", "_").upper() in result.output
    for arguments in (
        ["--validation-workers", "0"],
        ["--port", "70000"],
        ["--ngrok"],
    ):
        assert CliRunner().invoke(main, arguments).exit_code == 2
    assert CliRunner().invoke(main, ["--version"]).output.startswith("text-generation-router ")


@pytest.mark.parametrize(("value", "expected"), [("0", False), ("1", True), ("true", True), ("false", False)])
def test_switches_from_the_environment(value: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFIX_CACHING", value)
    monkeypatch.setenv("API_KEY", "secret")
    monkeypatch.setenv("MAX_BEST_OF", "9")
    options = main.make_context("text-generation-router", ["--max-best-of", "3"]).params
    settings = settings_from(options)
    assert settings.prefix_caching is expected
    assert (settings.api_key, settings.max_best_of) == ("secret", 3)


def test_the_router_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, tgi_router.main; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
