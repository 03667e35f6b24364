"""Where the parts are put together: the route table, what surrounds it, and the life of the server.

Start: tokenizer, shards (connect, warm up), routes, and only then the port, so that a refused connection
means "still loading". End: on the first signal new requests get 503 while those under way finish; a second
one ends at once.
"""

import asyncio
import contextlib
import gc
import ipaddress
import json
import signal
import socket
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import structlog
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from tgi_router.api import docs, endpoints, openapi
from tgi_router.api.endpoints import Endpoint
from tgi_router.api.health import ServerRoutes
from tgi_router.api.kserve import KServeRoutes
from tgi_router.api.middleware import CORS, APIKey, RequestIds
from tgi_router.api.native import NativeRoutes
from tgi_router.api.openai import Served
from tgi_router.api.openai_chat import ChatRoutes
from tgi_router.api.openai_completions import CompletionRoutes
from tgi_router.api.replies import (
    Handler,
    answering_errors,
    record_failure,
    reply_to,
)
from tgi_router.api.requests import RequestRoutes
from tgi_router.api.sagemaker import SageMakerRoutes
from tgi_router.api.vertex import VertexRoutes
from tgi_router.connection import Connection
from tgi_router.errors import IncompleteGeneration
from tgi_router.generation import Generation
from tgi_router.grammar.compile import GrammarCompiler
from tgi_router.metrics import Metrics
from tgi_router.scheduling.step_loop import StepLoop, limits_of_steps
from tgi_router.schemas.native import Info
from tgi_router.settings import Settings
from tgi_router.shards.client import ModelFacts, ShardClient, ShardsLost, WarmupRefused
from tgi_router.shards.group import ShardGroup
from tgi_router.text import chat_template
from tgi_router.text.chat_template import ChatTemplate
from tgi_router.text.tokenizer import Tokenizer, read_special_tokens
from tgi_router.tracing import Tracing, TracingUnavailable
from tgi_router.validation import Limits, Validator

VERSION = version("text-generation-server")
DISCOVERY_TIMEOUT_S = 10.0
GC_THRESHOLD = 20_000  # new objects before the collector looks at them
MAX_CHOICES = 128  # OpenAI's limit of `n`
KEEP_ALIVE_TIMEOUT_S = 75  # longer than the pools of common clients and proxies keep an idle connection

log = structlog.get_logger(__name__)


class StartError(Exception):
    """The server cannot serve like this; the text is for whoever started it."""


@dataclass(frozen=True, slots=True)
class App:
    asgi: ASGIApp
    metrics_asgi: ASGIApp  # /metrics and nothing else
    generation: Generation
    grammars: GrammarCompiler | None  # whoever builds the app closes it
    routes: Sequence[BaseRoute]


def build(
    settings: Settings,
    step_loop: StepLoop,
    metrics: Metrics,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    tracing: Tracing | None = None,
) -> App:
    """The application for shards that are ready. Raises StartError."""
    limits = settle_limits(settings, step_loop.model)
    metrics.open_lengths(limits.max_input_tokens, limits.max_total_tokens)
    model = step_loop.model
    grammars = None
    if settings.grammars:
        grammars = GrammarCompiler(tokenizer.to_json(), model.vocab_size, model.eos_token_ids)
    generation = Generation(
        step_loop,
        Validator(tokenizer, limits, grammars, tracing=tracing),
        tokenizer,
        metrics,
        eos_token_ids=step_loop.model.eos_token_ids,
        max_concurrent_requests=settings.max_concurrent_requests,
        max_queue_time_s=settings.max_queue_time_s,
        tracing=tracing,
    )
    served = Served(
        settings.served_model_name,
        f"{VERSION}-{settings.docker_label or 'native'}",
        settings.compute_type,
    )
    completions = CompletionRoutes(
        generation,
        served,
        max_client_batch_size=settings.max_client_batch_size,
        payload_limit=settings.payload_limit,
    )
    chat = ChatRoutes(
        generation,
        tokenizer,
        template,
        served,
        tool_call_parser=settings.tool_call_parser,
        reasoning_parser=settings.reasoning_parser,
        payload_limit=settings.payload_limit,
    )
    native = NativeRoutes(
        generation,
        tokenizer,
        chat,
        compute_type=settings.compute_type,
        payload_limit=settings.payload_limit,
    )
    vertex = VertexRoutes(generation, chat, payload_limit=settings.payload_limit)
    kserve = KServeRoutes(step_loop, generation, version=VERSION, payload_limit=settings.payload_limit)
    server = ServerRoutes(step_loop, generation, metrics, info_of(settings, limits), created=int(time.time()))

    requests = RequestRoutes(generation)

    def answers(handler: Handler, *, json_body_errors: bool = False) -> Handler:
        return answering_errors(handler, metrics, json_body_errors=json_body_errors)

    async def broken(request: Request, _: Exception) -> Response:
        """The server logs the exception itself."""
        error = IncompleteGeneration()
        record_failure(metrics, error, request.url.path)
        return reply_to(error, in_openai_shape=request.url.path.startswith("/v1/"))

    rows = endpoints.table(settings.vertex_predict_path, settings.vertex_health_path)
    generating: dict[str, Handler] = {
        "compat_generate": native.compat_generate,
        "generate": native.generate,
        "generate_stream": native.generate_stream,
        "tokenize": native.tokenize,
        "chat_tokenize": native.chat_tokenize,
        "chat_completions": chat.chat_completions,
        "completions": completions.completions,
        "cancel_request": requests.cancel,
        "vertex_compatibility": vertex.predict,
        "kserve_model_infer": kserve.infer,
    }
    has_openai_errors = {row.name: row.has_openai_errors for row in rows}
    handlers: dict[str, Handler] = {
        name: answers(handler, json_body_errors=has_openai_errors[name])
        for name, handler in generating.items()
    }
    sagemaker = SageMakerRoutes(
        [handlers[name] for name in ("compat_generate", "chat_completions", "completions")],
        settings.payload_limit,
    )
    handlers |= {
        "sagemaker_compatibility": answers(sagemaker.invocations),
        "openai_get_model_info": server.models,
        "openai_get_model": server.model,
        "kserve_server_metadata": kserve.server_metadata,
        "kserve_health_live": kserve.live,
        "kserve_health_ready": kserve.ready,
        "kserve_model_metadata": kserve.model_metadata,
        "kserve_model_ready": kserve.ready,
        "health": server.health,
        "get_model_info": server.info,
        "metrics": server.metrics,
        "docs": docs.page,
        "openapi": docs.document_of(document_of(settings, rows)),
    }
    starlette = Starlette(
        routes=[*routes_of(rows, handlers, tracing), Route("/docs", docs.to_page)],
        exception_handlers={HTTPException: _empty_reply, Exception: broken},
    )
    starlette.router.redirect_slashes = False
    asgi: ASGIApp = starlette
    if settings.api_key is not None:
        open_methods = {row.path: ("GET", "HEAD") for row in rows if row.method == "GET"}
        asgi = APIKey(asgi, settings.api_key, {row.path for row in rows if row.needs_key}, open_methods)
    metrics_asgi = Starlette(
        routes=[Route("/metrics", server.metrics)], exception_handlers={HTTPException: _empty_reply}
    )
    return App(
        CORS(RequestIds(asgi, ("/tokenize", "/chat_tokenize")), settings.cors_allow_origin),
        metrics_asgi,
        generation,
        grammars,
        starlette.routes,
    )


def document_of(settings: Settings, rows: Sequence[Endpoint]) -> dict[str, Any]:
    return openapi.document(rows, VERSION, has_key=settings.api_key is not None)


def schema(settings: Settings) -> str:
    """The OpenAPI document of a server with these settings, as indented JSON."""
    rows = endpoints.table(settings.vertex_predict_path, settings.vertex_health_path)
    return json.dumps(document_of(settings, rows), indent=2)


def routes_of(
    rows: Sequence[Endpoint], handlers: Mapping[str, Handler], tracing: Tracing | None
) -> list[Route]:
    """One for each path; some answer GET and POST."""
    by_path: dict[str, dict[str, Handler]] = {}
    for row in rows:
        handler = handlers[row.name]
        if tracing is not None:
            handler = tracing.traced(handler, row.name, row.path)
        by_path.setdefault(row.path, {})[row.method] = handler
    return [Route(path, _by_method(methods), methods=list(methods)) for path, methods in by_path.items()]


def _by_method(methods: dict[str, Handler]) -> Handler:
    if len(methods) == 1:
        return next(iter(methods.values()))

    async def choose(request: Request) -> Response:
        return await methods["GET" if request.method == "HEAD" else request.method](request)

    return choose


async def _empty_reply(_: Request, error: Exception) -> Response:
    """Unknown paths and wrong methods: the status says it all."""
    assert isinstance(error, HTTPException)
    return Response(status_code=error.status_code, headers=error.headers)


def settle_limits(settings: Settings, model: ModelFacts) -> Limits:
    """The limits of a request, from what the user set and what the shards have room for.

    Raises StartError.
    """
    max_batch_total_tokens = model.usable_tokens(settings.max_batch_total_tokens)
    max_batch_total_tokens -= len(model.decoder_start_token_ids)
    longest_first_step = _longest_first_step(settings, model)
    max_total_tokens = settings.max_total_tokens
    if max_total_tokens is None:
        max_total_tokens = min(model.max_total_tokens, max_batch_total_tokens)
        log.info(f"Maximum total tokens defaulted to {max_total_tokens}")
    elif max_total_tokens > max_batch_total_tokens:
        raise StartError(
            "`max_total_tokens` must be <= `max_batch_total_tokens`. "
            f"Given: {max_total_tokens} and {max_batch_total_tokens}"
        )
    max_input_tokens = settings.max_input_tokens
    if max_input_tokens is None:
        max_input_tokens = max_total_tokens - 1
        if longest_first_step is not None:
            max_input_tokens = min(max_input_tokens, longest_first_step)
        log.info(f"Maximum input tokens defaulted to {max_input_tokens}")
    if max_input_tokens >= max_total_tokens:
        raise StartError("`max_input_tokens` must be < `max_total_tokens`")
    if longest_first_step is not None and max_input_tokens > longest_first_step:
        raise StartError(
            f"`max_input_tokens` must be <= {longest_first_step}. Given: {max_input_tokens}. The model's "
            "encoder reads a prompt in one step: raise `max_batch_prefill_tokens`, or lower "
            "`max_batch_size`, whose answers have a token each in that step"
        )
    return Limits(
        max_best_of=settings.max_best_of,
        max_stop_sequences=settings.max_stop_sequences,
        max_top_n_tokens=settings.max_top_n_tokens,
        max_input_tokens=max_input_tokens,
        max_total_tokens=max_total_tokens,
        vocab_size=model.vocab_size,
        prompt_logprobs=settings.enable_prefill_logprobs,
        max_choices=min(MAX_CHOICES, settings.max_concurrent_requests),
        has_encoder=model.has_encoder,
        takes_images=model.takes_images,
    )


def _longest_first_step(settings: Settings, model: ModelFacts) -> int | None:
    """Prompt tokens that fit into one step, if an encoder must read all of them in one."""
    if not model.has_encoder:
        return None
    steps = limits_of_steps(settings.max_batch_prefill_tokens, settings.max_sequences)
    return steps.max_first_tokens - len(model.decoder_start_token_ids)


def info_of(settings: Settings, limits: Limits) -> Info:
    return Info(
        model_id=settings.served_model_name,
        model_sha=None,
        model_pipeline_tag=None,
        max_concurrent_requests=settings.max_concurrent_requests,
        max_best_of=settings.max_best_of,
        max_stop_sequences=settings.max_stop_sequences,
        max_input_tokens=limits.max_input_tokens,
        max_total_tokens=limits.max_total_tokens,
        validation_workers=settings.validation_workers,
        max_client_batch_size=settings.max_client_batch_size,
        router="text-generation-router",
        version=VERSION,
        sha=settings.git_sha,
        docker_label=settings.docker_label,
    )


# The life of the server


class Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals are `serve`'s business."""
        yield


async def serve(settings: Settings) -> None:
    """Until a signal has ended it. Raises StartError, TokenizerUnavailable, and what breaks the step loop."""
    signals = Signals()
    tokenizer = Tokenizer.load(
        settings.tokenizer_path,
        num_workers=settings.validation_workers,
        config_path=settings.tokenizer_config_path,
    )
    template = chat_template.load(
        settings.tokenizer_path,
        settings.tokenizer_config_path,
        read_special_tokens(settings.tokenizer_path, settings.tokenizer_config_path),
    )
    metrics = Metrics()
    async with contextlib.AsyncExitStack() as stack:
        tracing = None
        if settings.otlp_endpoint is not None:
            tracing = open_tracing(settings.otlp_endpoint, settings.otlp_service_name)
            stack.push_async_callback(asyncio.to_thread, tracing.close)
        stack.callback(tokenizer.close)
        starting = asyncio.create_task(_start(settings, metrics))
        step_loop = await signals.unless_first(starting)
        if step_loop is None:
            return
        stack.push_async_callback(step_loop.close)
        app = build(settings, step_loop, metrics, tokenizer, template, tracing)
        if app.grammars is not None:
            stack.push_async_callback(app.grammars.close)
            await app.grammars.ready()
        listener = bind(settings.hostname, settings.port)
        await _serve_metrics(settings, app.metrics_asgi, stack)
        server = Server(uvicorn_config(app.asgi))
        serving = asyncio.create_task(server.serve([listener]))
        # What has been built stays, and most of what a token makes is gone at once: the collector need not
        # walk through all of it again and again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)
        log.info("Connected")
        broken = asyncio.create_task(step_loop.join())
        stack.callback(broken.cancel)
        await signals.first_or(serving, broken)
        if broken.done():
            server.force_exit = server.should_exit = True
            await serving
            broken.result()
        log.info("signal received, starting graceful shutdown")
        draining = asyncio.create_task(_drain(app.generation, server, serving))
        await signals.second_or(draining)
        server.force_exit = server.should_exit = True
        draining.cancel()
        await asyncio.gather(draining, serving, return_exceptions=True)


def open_tracing(endpoint: str, service_name: str) -> Tracing:
    """Raises StartError."""
    try:
        return Tracing.to_collector(endpoint, service_name)
    except TracingUnavailable as error:
        raise StartError(str(error)) from error


async def _start(settings: Settings, metrics: Metrics) -> StepLoop:
    """Reach the shards and warm them up. Raises StartError."""
    addresses = await discover(settings.master_shard_uds_path)
    step_loop = StepLoop(
        ShardGroup(addresses),
        metrics,
        max_batch_prefill_tokens=settings.max_batch_prefill_tokens,
        max_total_tokens=settings.max_total_tokens,
        max_sequences=settings.max_sequences,
        max_kv_tokens=settings.max_batch_total_tokens,
        share_prefixes=settings.prefix_caching,
        stall_timeout_s=settings.stall_timeout_s,
    )
    log.info("Warming up model")
    try:
        await step_loop.start()
    except WarmupRefused as error:
        await step_loop.close()
        raise StartError(str(error)) from error
    if settings.prefix_caching and step_loop.model.has_encoder:
        log.info("Disabling prefix caching because of seq2seq model")
    max_batch_total_tokens = step_loop.model.usable_tokens(settings.max_batch_total_tokens)
    metrics.tgi_batch_max_total_tokens.set(max_batch_total_tokens)
    log.info(f"Setting max batch total tokens to {max_batch_total_tokens}")
    return step_loop


async def discover(master_shard_uds_path: str) -> list[str]:
    """Addresses of all ranks: rank 0 knows how many there are; their sockets differ in the last number."""
    prefix, _, rank = master_shard_uds_path.rpartition("-")
    if rank != "0":
        raise StartError(f"`--master-shard-uds-path` must end in -0. Given: {master_shard_uds_path}")
    while True:
        client = ShardClient(f"unix:{master_shard_uds_path}")
        try:
            info = await client.info(DISCOVERY_TIMEOUT_S)
        except ShardsLost as error:
            log.warning("Waiting for the shards", reason=str(error))
            await asyncio.sleep(1.0)
        else:
            return [f"unix:{prefix}-{rank}" for rank in range(info.world_size)]
        finally:
            await client.close()


async def _drain(generation: Generation, server: Server, serving: asyncio.Task[None]) -> None:
    await generation.drain()
    server.should_exit = True  # sends what is left, closes the port and the connections
    await serving


async def _serve_metrics(settings: Settings, asgi: ASGIApp, stack: contextlib.AsyncExitStack) -> None:
    """On the port that TGI promised for metrics; a busy one costs a warning only."""
    if settings.prometheus_port == settings.port:
        return
    try:
        listener = bind(settings.hostname, settings.prometheus_port)
    except StartError as error:
        log.warning(f"Metrics are served on the main port alone. {error}")
        return
    server = Server(uvicorn_config(asgi))
    serving = asyncio.create_task(server.serve([listener]))

    async def stop() -> None:
        server.force_exit = server.should_exit = True
        await serving

    stack.push_async_callback(stop)


def uvicorn_config(asgi: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        asgi,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_TIMEOUT_S,
    )


def bind(hostname: str, port: int) -> socket.socket:
    """Raises StartError."""
    try:
        address = ipaddress.ip_address(hostname)
    except ValueError:
        log.warning("Invalid hostname, defaulting to 0.0.0.0", hostname=hostname)
        address = ipaddress.IPv4Address("0.0.0.0")
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections take it over. Without it an answer's second write waits for an acknowledgement: 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind((str(address), port))
    except OSError as error:
        listener.close()
        raise StartError(f"Failed to bind to {address}:{port}: {error}") from error
    return listener


class Signals:
    """SIGTERM and SIGINT, counted. Made on the running loop."""

    def __init__(self) -> None:
        self._first = asyncio.Event()
        self._second = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._count)

    def _count(self) -> None:
        (self._second if self._first.is_set() else self._first).set()

    async def first_or(self, *tasks: "asyncio.Task[None]") -> None:
        await _either(self._first, *tasks)

    async def second_or(self, *tasks: "asyncio.Task[None]") -> None:
        await _either(self._second, *tasks)

    async def unless_first(self, task: "asyncio.Task[StepLoop]") -> StepLoop | None:
        """The task's result; None, and the task cancelled, if a signal comes first."""
        await _either(self._first, task)
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return None


async def _either(event: asyncio.Event, *tasks: "asyncio.Task[None] | asyncio.Task[StepLoop]") -> None:
    waiter = asyncio.create_task(event.wait())
    try:
        await asyncio.wait([waiter, *tasks], return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiter.cancel()
