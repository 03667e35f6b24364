"""One rank as a gRPC server on a Unix socket: wire -> engine -> wire, and the life of the process.

Calls are answered on an asyncio loop in the main thread; what touches the device runs in the engine's thread.
A sequence that cannot be stepped fails alone. Anything else that a step raises ends the stream, with INTERNAL
or, out of memory, RESOURCE_EXHAUSTED; and then the process, unless it is the only rank and its device still
answers. The router rebuilds what is lost.
"""

import asyncio
import gc
import json
import logging
import os
import signal
import time
import traceback
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import torch

from tgi_proto import generate_pb2 as pb
from tgi_proto import generate_pb2_grpc as pb_grpc
from tgi_shard import wire
from tgi_shard.distributed import Group, close_group, init_group
from tgi_shard.engine import Engine
from tgi_shard.engine_thread import AwaitedMasks, EngineThread
from tgi_shard.memory import Limits
from tgi_shard.model_folder import ModelError, read_config
from tgi_shard.models.registry import LoadedModel, load_model
from tgi_shard.plan import Masks, StepPlan, StepResult
from tgi_shard.sampling.sampler import Sampler
from tgi_shard.settings import Settings
from tgi_shard.tracing import SequenceSpans
from tgi_shard.warmup import NotEnoughMemory, warm_up

log = logging.getLogger(__name__)

# Steps on a CPU keep every core busy. What sends the tokens and answers /health computes little, but at an
# equal priority it waits for the end of a time slice, or of two.
CPU_NICENESS = 5
PROGRESS_INTERVAL_S = 2.0
MAX_FAILURES_IN_A_ROW = 16  # steps that raise before a fresh process is the better guess
STOP_GRACE_S = 1.0  # for streams that are open at SIGTERM: the router drains, not the shard
# How long one of several ranks may still compute what a broken stream had asked for: the others may never get
# that plan, and then it waits for them in a collective for ever.
STRANDED_FACTOR = 10  # times its longest step so far
MIN_STRANDED_S = 5.0
ENGINE_STOP_TIMEOUT_S = 5.0  # a rank whose peers are gone may wait in a collective for longer

SERVER_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),
]


class EngineFailed(Exception):
    """A step raised what this process cannot go on from. It must end."""


def serve(settings: Settings) -> None:
    """Load the model and answer until SIGTERM or SIGINT. Raises ModelError, EngineFailed."""
    # Left behind by a process that was killed. It goes at once: a socket there means a rank that is ready.
    socket = Path(f"{settings.uds_path}-{settings.rank}").absolute()
    socket.unlink(missing_ok=True)
    if settings.device.type == "cpu":
        os.nice(CPU_NICENESS)  # before there are threads: each takes it from its maker
    spans = None
    if settings.otlp_endpoint is not None:
        spans = SequenceSpans.to_collector(settings.otlp_endpoint, settings.otlp_service_name, settings.rank)
    group = init_group(
        settings.rank,
        settings.world_size,
        settings.device,
        settings.master_addr,
        settings.master_port,
        sums_in_order=settings.deterministic,
    )
    thread = EngineThread()
    thread.start()
    try:
        # In the thread that will run the steps: OpenMP keeps a pool of threads for every thread that has ever
        # computed, and lets all of them spin less once they are more than there are cores.
        loaded = thread.call(lambda: _load(settings, group)).result()
        gc.collect()
        gc.freeze()  # what is loaded stays: the collector need not walk through it again
        asyncio.run(_serve(settings, loaded, group, thread, spans, f"unix://{socket}"))
    finally:
        socket.unlink(missing_ok=True)
        close_group(group)


def _load(settings: Settings, group: Group) -> LoadedModel:
    if settings.device.type == "cuda":
        torch.cuda.set_device(settings.device)  # the current device is a thread's own
    began_at = time.monotonic()
    progress = _Progress()
    loaded = load_model(
        settings.model_path,
        dtype=settings.dtype,
        device=settings.device,
        group=group,
        rope_override=settings.rope_override,
        trust_remote_code=settings.trust_remote_code,
        deterministic=settings.deterministic,
        progress=progress,
    )
    seconds = max(time.monotonic() - began_at, 1e-3)
    log.info(
        "Loaded %s (%s): %.2f GB in %.2f s, %.2f GB/s",
        settings.model_id,
        loaded.model_type,
        progress.bytes_done / 1e9,
        seconds,
        progress.bytes_done / 1e9 / seconds,
    )
    return loaded


class _Progress:
    """A log line every few seconds while weights are read."""

    def __init__(self) -> None:
        self.bytes_done = 0
        self._logged_at = time.monotonic()

    def __call__(self, bytes_done: int, bytes_total: int) -> None:
        self.bytes_done = bytes_done
        now = time.monotonic()
        if now - self._logged_at >= PROGRESS_INTERVAL_S:
            self._logged_at = now
            percent = 100 * bytes_done // max(bytes_total, 1)
            log.info("Loading weights: %d%% (%.2f of %.2f GB)", percent, bytes_done / 1e9, bytes_total / 1e9)


async def _serve(
    settings: Settings,
    loaded: LoadedModel,
    group: Group,
    thread: EngineThread,
    spans: SequenceSpans | None,
    address: str,
) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    service = Service(settings, loaded, group, thread, stopped, spans)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    pb_grpc.add_TextGenerationServicer_to_server(service, server)
    server.add_insecure_port(address)
    await server.start()
    log.info("Server started at %s", address)
    await stopped.wait()
    await server.stop(STOP_GRACE_S)
    if not await asyncio.to_thread(service.thread.stop, ENGINE_STOP_TIMEOUT_S):
        log.warning("A step is still under way: it is left")
    if spans is not None:
        await asyncio.to_thread(spans.close)
    if service.failure is not None:
        raise EngineFailed(str(service.failure)) from service.failure


class Service(pb_grpc.TextGenerationServicer):
    """The methods of generate.proto. `stopped` is set when a step has failed for good."""

    def __init__(
        self,
        settings: Settings,
        loaded: LoadedModel,
        group: Group,
        thread: EngineThread,
        stopped: asyncio.Event,
        spans: SequenceSpans | None = None,
    ) -> None:
        self._spans = spans
        self.settings = settings
        self.loaded = loaded
        self.group = group
        self.failure: Exception | None = None
        self.thread = thread
        self.thread.on_failure = self._on_failure
        self._loop = asyncio.get_running_loop()
        self._stopped = stopped
        self._eos_token_ids = eos_token_ids(settings.model_path)
        self._engine: Engine | None = None
        self._warm_up: tuple[Limits, asyncio.Task[Engine]] | None = None  # under way or done
        self._stream: _Stream | None = None  # the open one
        self._leaving: asyncio.Task[None] | None = None  # asyncio keeps no task alive

    async def Info(self, request: pb.InfoRequest, context: "Context") -> pb.InfoResponse:
        return pb.InfoResponse(
            model_type=self.loaded.model_type,
            dtype=str(self.loaded.dtype).removeprefix("torch."),
            device_type=self.settings.device.type,
            vocab_size=self.loaded.vocab_size,
            max_position_embeddings=self.loaded.max_position_embeddings,
            eos_token_ids=self._eos_token_ids,
            world_size=self.group.world_size,
            rank=self.group.rank,
            decoder_start_token_ids=self.loaded.decoder_start_token_ids,
        )

    async def Health(self, request: pb.HealthRequest, context: "Context") -> pb.HealthResponse:
        now = time.monotonic()
        ended_at, began_at = self.thread.last_step_ended_at, self.thread.step_began_at
        return pb.HealthResponse(
            last_step_id=self.thread.last_step_id,
            last_step_age_s=0.0 if ended_at is None else now - ended_at,
            current_step_age_s=0.0 if began_at is None else now - began_at,
            longest_step_s=self.thread.longest_step_s,
        )

    async def Warmup(self, request: pb.WarmupRequest, context: "Context") -> pb.WarmupResponse:
        limits = Limits(request.max_step_tokens, request.max_total_tokens, request.max_sequences)
        if limits.max_step_tokens < 1 or limits.max_sequences < 1:
            message = f"max_step_tokens and max_sequences must be at least 1: {limits}"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, message)
        is_first = self._warm_up is None
        if self._warm_up is None:
            self._warm_up = limits, asyncio.create_task(self._warm_up_once(limits))
        asked, task = self._warm_up
        if limits != asked:
            message = f"this shard was warmed up for {asked}, not for {limits}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, message)
        try:
            # All ranks warm up together: a caller that goes away and comes back finds the one under way. A
            # second one would wait for the other ranks in vain.
            engine = await asyncio.shield(task)
        except NotEnoughMemory as error:
            self._warm_up = None
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
            raise
        except ModelError as error:
            self._warm_up = None
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
            raise
        except Exception as error:
            log.exception("Warm-up failed")
            self._warm_up = None
            await context.abort(grpc.StatusCode.INTERNAL, f"warm-up failed: {_describe(error)}")
            raise
        if not is_first:
            await self._forget()
        return pb.WarmupResponse(
            num_blocks=engine.slots.num_kv_blocks,
            block_size=engine.slots.block_size,
            max_total_tokens=engine.slots.max_total_tokens - engine.slots.num_start_tokens,
            blocks_are_states=not self.loaded.model.kv_shape.can_share_prefixes,
        )

    async def _warm_up_once(self, limits: Limits) -> Engine:
        self._engine = await asyncio.wrap_future(self.thread.call(lambda: self._warm_up_now(limits)))
        return self._engine

    def _warm_up_now(self, limits: Limits) -> Engine:
        sampler = Sampler(self.settings.watermark_gamma, self.settings.watermark_delta)
        return warm_up(
            self.loaded,
            sampler,
            self.group,
            self.settings.device,
            limits,
            memory_fraction=self.settings.memory_fraction,
            on_step=self.thread.note_step,
        )

    async def Run(
        self, requests: AsyncIterator[pb.RunRequest], context: "Context"
    ) -> AsyncIterator[pb.StepResult]:
        engine = self._engine
        if engine is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "Run needs a Warmup before it")
            return
        if self._stream is not None:  # of a router that is gone, and whose going has not been noticed yet
            self._stream.end(grpc.StatusCode.ABORTED, "another Run stream has been opened")
        stream = self._stream = _Stream()
        # Plans of an older stream that still wait for the thread run first: other ranks may have run them.
        self.thread.call(engine.forget)
        stream.reader = asyncio.create_task(self._read(requests, engine, stream))
        try:
            while not isinstance(result := await stream.results.get(), _End):
                yield wire.step_result(result)
            if result.code is not grpc.StatusCode.OK:
                await context.abort(result.code, result.message)
        finally:
            stream.reader.cancel()
            stream.give_up_masks()
            if self._spans is not None and self._stream is stream:
                self._spans.end_all()
            if self._stream is stream:
                self._stream = None
                forgotten = self.thread.call(engine.forget)
                if self.group.world_size > 1:
                    self._leaving = asyncio.create_task(self._leave_if_stranded(forgotten))

    async def _read(self, requests: AsyncIterator[pb.RunRequest], engine: Engine, stream: "_Stream") -> None:
        """Hand the plans to the engine's thread as they come, and the masks to the plans that await them."""

        def deliver(result: StepResult | _End) -> None:
            self._loop.call_soon_threadsafe(stream.results.put_nowait, result)

        try:
            async for request in requests:
                if request.HasField("masks"):
                    masks = wire.masks(request.masks, engine.slots.vocab_size)
                    if (future := stream.awaited.pop(masks.step_id, None)) is None:
                        raise wire.MalformedPlan(f"masks of step {masks.step_id}, which awaits none")
                    future.set_result(masks)
                else:
                    if self._spans is not None:
                        self._spans.follow(request.plan)
                    plan = wire.step_plan(request.plan)
                    self.thread.run_plan(engine, plan, deliver, self._await_masks(plan, stream))
            if stream.awaited and self.group.rank == 0:
                raise wire.MalformedPlan(f"no masks have come for the steps {sorted(stream.awaited)}")
        except wire.MalformedPlan as error:
            stream.end(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            return
        # The router has closed its side: what is under way is still answered.
        self.thread.call(lambda: deliver(_End(grpc.StatusCode.OK, "")))

    def _await_masks(self, plan: StepPlan, stream: "_Stream") -> AwaitedMasks | None:
        """None: the step runs through. Rank 0 chooses the tokens, the others wait for it."""
        if not plan.await_masks:
            return None
        future = stream.awaited[plan.step_id] = Future[Masks | None]()

        def on_timeout(message: str) -> None:
            self._loop.call_soon_threadsafe(stream.end, grpc.StatusCode.DEADLINE_EXCEEDED, message)

        return AwaitedMasks(future, on_timeout) if self.group.rank == 0 else None

    async def _leave_if_stranded(self, forgotten: "Future[None]") -> None:
        """`forgotten` is done when all that the stream had asked for is."""
        timeout_s = max(MIN_STRANDED_S, STRANDED_FACTOR * self.thread.longest_step_s)
        done, _ = await asyncio.wait([asyncio.wrap_future(forgotten)], timeout=timeout_s)
        if not done and not self._stopped.is_set():
            message = f"a step of a stream that broke has not ended within {timeout_s:.1f} s"
            log.critical("This process ends: %s. Other ranks may not have got its plan", message)
            self.failure = EngineFailed(message)
            self._stopped.set()

    async def _forget(self) -> None:
        if self._engine is not None:
            await asyncio.wrap_future(self.thread.call(self._engine.forget))

    def _on_failure(self, error: Exception) -> bool:
        """In the engine's thread: whether it goes on.

        The stream ends in any case, and with it all that the engine knew of its sequences: the router opens
        the next one, adds the living, and finds out who was to blame.
        """
        if self._stopped.is_set():  # the other ranks are leaving as well: a step may find them gone
            log.warning("A step was given up: %s", _describe(error))
            return False
        is_out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        code = grpc.StatusCode.RESOURCE_EXHAUSTED if is_out_of_memory else grpc.StatusCode.INTERNAL
        goes_on = self._is_usable()
        if goes_on:
            log.error("A step failed; the sequences are forgotten", exc_info=error)
            traceback.clear_frames(error.__traceback__)  # they hold what the step had on the device
            if is_out_of_memory and self.settings.device.type == "cuda":
                torch.cuda.empty_cache()
        else:
            log.critical("A step failed; this process ends", exc_info=error)
            self.failure = error
        self._loop.call_soon_threadsafe(self._end_failed, code, _describe(error), goes_on)
        return goes_on

    def _is_usable(self) -> bool:
        """Whether the next step can be any better in this process. Called after one has failed."""
        if self.group.world_size > 1:
            return False  # the other ranks are in the middle of the step, and wait for this one
        if self.thread.num_failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
            return False
        if self.settings.device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError:  # its errors stay: no later call in this process would do better
                return False
        return True

    def _end_failed(self, code: grpc.StatusCode, message: str, goes_on: bool) -> None:
        if self._stream is not None:
            self._stream.end(code, message)
        if not goes_on:
            self._stopped.set()


Context = grpc.aio.ServicerContext


@dataclass(frozen=True, slots=True)
class _End:
    """The last thing that a stream gets."""

    code: grpc.StatusCode
    message: str


@dataclass(slots=True)
class _Stream:
    """An open Run call."""

    results: asyncio.Queue[StepResult | _End] = field(default_factory=asyncio.Queue)
    reader: asyncio.Task[None] | None = None
    awaited: "dict[int, Future[Masks | None]]" = field(default_factory=dict)  # by step id

    def give_up_masks(self) -> None:
        """None will come any more: wake the engine, which may be waiting."""
        while self.awaited:
            _, future = self.awaited.popitem()
            future.set_result(None)

    def end(self, code: grpc.StatusCode, message: str) -> None:
        """No further plan is read; results that are there already still go out."""
        if self.reader is not None:
            self.reader.cancel()
        self.results.put_nowait(_End(code, message))
        self.give_up_masks()


def eos_token_ids(model_path: Path) -> list[int]:
    """From generation_config.json, else from config.json; [] if neither names one."""
    generation_config = model_path / "generation_config.json"
    named = None
    if generation_config.is_file():
        named = json.loads(generation_config.read_text()).get("eos_token_id")
    if named is None:
        config = read_config(model_path)
        named = config.get("eos_token_id") or (config.get("text_config") or {}).get("eos_token_id")
    if named is None:
        return []
    return [named] if isinstance(named, int) else list(named)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
