"""Traces, as a collector receives them over OTLP/gRPC."""

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as collector
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as collector_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

import tiny_tokenizers
from router_app import Running, running
from scripted_shard import ScriptedShard
from tgi_proto import generate_pb2 as pb
from tgi_router.app import StartError, open_tracing
from tgi_router.tracing import Tracing
from tgi_shard.tracing import SequenceSpans

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"
BODY = {"inputs": "the one", "parameters": {"max_new_tokens": 4, "seed": 7, "do_sample": True}}


class Collector(collector_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: dict[str, list[Span]] = {}  # by service
        self._received = threading.Lock()

    def Export(self, request: Any, context: object) -> Any:
        with self._received:
            for resource in request.resource_spans:
                named = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
                for scope in resource.scope_spans:
                    self.spans.setdefault(named["service.name"], []).extend(scope.spans)
        return collector.ExportTraceServiceResponse()

    def named(self, service: str, name: str) -> list[Span]:
        return [span for span in self.spans.get(service, []) if span.name == name]


@pytest.fixture
def receiver() -> Iterator[tuple[Collector, str]]:
    service = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    collector_grpc.add_TraceServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield service, f"http://127.0.0.1:{port}"
    server.stop(None).wait()


class FollowedShard(ScriptedShard):
    """A scripted shard that traces like a real one."""

    spans: SequenceSpans | None = None

    def apply(self, plan: pb.StepPlan, masks: pb.Masks | None = None) -> pb.StepResult:
        if self.spans is not None:
            self.spans.follow(plan)
        return super().apply(plan, masks)


@asynccontextmanager
async def traced(folder: Path, endpoint: str) -> AsyncIterator[Running]:
    tracing = Tracing.to_collector(endpoint, "the router")
    shard = FollowedShard(vocab_size=tiny_tokenizers.VOCAB_SIZE, num_blocks=256)
    shard.spans = SequenceSpans.to_collector(endpoint, "the shard", rank=0)
    try:
        async with running(folder, shard=shard, tracing=tracing) as router:
            yield router
            await asyncio.sleep(0.05)  # the plan that drops what has ended
    finally:
        await asyncio.to_thread(tracing.close)
        await asyncio.to_thread(shard.spans.close)


def attributes(span: Span) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, str(pair.value.WhichOneof("value"))) for pair in span.attributes}


@pytest.mark.parametrize("route", ["generate", "generate_stream"])
async def test_a_request_is_one_trace_from_its_caller_to_the_shard(
    tmp_path: Path, receiver: tuple[Collector, str], route: str
) -> None:
    service, endpoint = receiver
    async with traced(tmp_path, endpoint) as router:
        response = await router.post(f"/{route}", BODY, headers={"traceparent": PARENT})
        assert response.status_code == 200
    handler, generation = service.named("the router", route)
    if handler.kind != Span.SPAN_KIND_SERVER:
        handler, generation = generation, handler
    assert handler.parent_span_id.hex() == "b7ad6b7169203331"
    assert attributes(handler)["http.route"] == f"/{route}"
    assert attributes(handler)["http.response.status_code"] == 200
    assert attributes(handler)["seed"] == "7"
    assert {"total_time", "validation_time", "queue_time", "inference_time"} < attributes(handler).keys()
    stages = [service.named("the router", name) for name in ("validate", "queued", "infer", "tokenize")]
    (validate,), (queued,), (infer,), (tokenize,) = stages
    assert generation.parent_span_id == handler.span_id
    for span in (validate, queued, infer, tokenize):
        assert span.parent_span_id == generation.span_id
    assert validate.end_time_unix_nano == queued.start_time_unix_nano
    assert queued.end_time_unix_nano == infer.start_time_unix_nano
    assert infer.end_time_unix_nano <= generation.end_time_unix_nano <= handler.end_time_unix_nano
    (sequence,) = service.named("the shard", "sequence")
    assert sequence.parent_span_id == generation.span_id
    assert attributes(sequence)["prompt_tokens"] == 6
    everything = [span for spans in service.spans.values() for span in spans]
    assert {span.trace_id.hex() for span in everything} == {TRACE_ID}


async def test_every_prompt_has_a_generation_of_its_own(
    tmp_path: Path, receiver: tuple[Collector, str]
) -> None:
    service, endpoint = receiver
    async with traced(tmp_path, endpoint) as router:
        body = {"prompt": ["a", "b"], "max_tokens": 2}
        assert (await router.post("/v1/completions", body)).status_code == 200
    (handler,) = service.named("the router", "completions")
    assert not handler.parent_span_id
    generations = service.named("the router", "generate")
    assert [span.parent_span_id for span in generations] == [handler.span_id] * 2
    assert len(service.named("the shard", "sequence")) == 2


async def test_failures_are_marked(tmp_path: Path, receiver: tuple[Collector, str]) -> None:
    service, endpoint = receiver
    async with traced(tmp_path, endpoint) as router:
        response = await router.post("/generate_stream", {"inputs": ""}, headers={"traceparent": "rubbish"})
        assert response.status_code == 200
        await router.client.get("/health")
    for span in service.named("the router", "generate_stream"):
        assert span.status.code == Status.STATUS_CODE_ERROR
        assert "`inputs` cannot be empty" in span.status.message
    assert len(service.named("the router", "health")) == 1


async def test_untraced_requests_carry_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as router:
        plans: list[pb.StepPlan] = []
        apply = router.shard.apply

        def kept(plan: pb.StepPlan, masks: pb.Masks | None = None) -> pb.StepResult:
            plans.append(plan)
            return apply(plan, masks)

        router.shard.apply = kept  # type: ignore[method-assign]
        await router.post("/generate", BODY)
    assert all(not added.traceparent for plan in plans for added in plan.add)


async def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(StartError, match=r"\[otel\]"):
        open_tracing("http://127.0.0.1:4317", "router")
