"""The router's application in this process: the real step loop before scripted shards behind real gRPC."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from tokenizers import Tokenizer as FastTokenizer

import tiny_tokenizers
from scripted_shard import ScriptedService, ScriptedShard, start_server
from tgi_router import app
from tgi_router.connection import Connection
from tgi_router.metrics import Metrics
from tgi_router.scheduling.step_loop import StepLoop
from tgi_router.settings import Settings
from tgi_router.shards.group import ShardGroup
from tgi_router.text import chat_template
from tgi_router.text.tokenizer import Tokenizer, read_special_tokens
from tgi_router.tracing import Tracing

SETTINGS = Settings(
    hostname="127.0.0.1",
    port=3000,
    prometheus_port=9000,
    master_shard_uds_path="/nowhere-0",
    tokenizer_path=Path("/nowhere"),
    served_model_name="some/model",
    tokenizer_config_path=None,
    max_concurrent_requests=8,
    max_queue_time_s=None,
    max_best_of=2,
    max_stop_sequences=4,
    max_top_n_tokens=5,
    max_input_tokens=None,
    max_total_tokens=None,
    max_client_batch_size=4,
    payload_limit=20_000,
    max_batch_prefill_tokens=64,
    max_batch_total_tokens=None,
    max_batch_size=None,
    prefix_caching=True,
    stall_timeout_s=60.0,
    validation_workers=2,
    enable_prefill_logprobs=False,
    grammars=True,
    cors_allow_origin=(),
    api_key=None,
    vertex_predict_path=None,
    vertex_health_path=None,
    compute_type="1-test",
    docker_label=None,
    git_sha=None,
    tool_call_parser=None,
    reasoning_parser=None,
    otlp_endpoint=None,
    otlp_service_name="router",
    json_output=False,
    log_level="info",
    log_colors=False,
)


@dataclass
class Running:
    client: httpx.AsyncClient
    shard: ScriptedShard
    step_loop: StepLoop
    app: app.App

    async def post(self, path: str, body: Any, **kwargs: Any) -> httpx.Response:
        return await self.client.post(path, json=body, **kwargs)


@asynccontextmanager
async def running(
    folder: Path,
    *,
    step_s: float = 0.0,
    shard: ScriptedShard | None = None,
    chat_template_text: str | None = tiny_tokenizers.CHAT_TEMPLATE,
    tracing: Tracing | None = None,
    saved_tokenizer: FastTokenizer | None = None,
    **changes: Any,
) -> AsyncIterator[Running]:
    """changes: fields of Settings in place of those above. saved_tokenizer: in place of the tiny one."""
    settings = replace(SETTINGS, tokenizer_path=folder, **changes)
    if saved_tokenizer is None:
        tiny_tokenizers.save(folder, chat_template=chat_template_text)
    else:
        tiny_tokenizers.save_tokenizer(saved_tokenizer, folder, chat_template=chat_template_text)
    tokenizer = Tokenizer.load(folder, num_workers=settings.validation_workers)
    template = chat_template.load(folder, None, read_special_tokens(folder))
    shard = shard or ScriptedShard(vocab_size=tiny_tokenizers.VOCAB_SIZE, num_blocks=256)
    address = f"unix:{folder}/shard-0"
    server = await start_server(ScriptedService(shard, step_s), address)
    metrics = Metrics()
    step_loop = StepLoop(
        ShardGroup([address]),
        metrics,
        max_batch_prefill_tokens=settings.max_batch_prefill_tokens,
        max_total_tokens=settings.max_total_tokens,
        max_sequences=settings.max_concurrent_requests,
        stall_timeout_s=settings.stall_timeout_s,
    )
    await step_loop.start()
    built = app.build(settings, step_loop, metrics, tokenizer, template, tracing)
    transport = httpx.ASGITransport(built.asgi)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://router", timeout=30) as client:
            yield Running(client, shard, step_loop, built)
    finally:
        await step_loop.close()
        if built.grammars is not None:
            await built.grammars.close()
        await server.stop(None)
        tokenizer.close()


@asynccontextmanager
async def listening(router: Running, protocol: type[Connection] = Connection) -> AsyncIterator[int]:
    """The port on which its application is served."""
    listener = app.bind("127.0.0.1", 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # its connections have it too
    config = app.uvicorn_config(router.app.asgi)
    config.http = protocol
    server = app.Server(config)
    serving = asyncio.create_task(server.serve([listener]))
    while not server.started:  # noqa: ASYNC110  # polled
        await asyncio.sleep(0.01)
    try:
        yield listener.getsockname()[1]
    finally:
        server.force_exit = server.should_exit = True
        await serving
