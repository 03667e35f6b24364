"""Traces: one span for each request's handler, below it one for each generation and its stages.

Spans are made a few times a request and never for a token or a step: what a token costs does not depend on
whether anybody traces. Off, nothing is wrapped and nothing is asked per request but `tracing is None`.
"""

import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

if TYPE_CHECKING:  # an extra: the router must start without it
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

Handler = Callable[[Request], Awaitable[Response]]

FLUSH_TIMEOUT_MS = 5000


class TracingUnavailable(Exception):
    """The packages that traces need are not installed; the text names the extra."""


class Tracing:
    """provider: of spans; whoever made it shuts it down through `close`."""

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._api = trace
        self._provider = provider
        self._tracer = provider.get_tracer("tgi_router")
        self._propagator = TraceContextTextMapPropagator()
        # Durations are measured on another clock than the one that spans are dated by.
        self._epoch_ns = time.time_ns() - time.perf_counter_ns()

    @classmethod
    def to_collector(cls, endpoint: str, service_name: str) -> "Tracing":
        """Over OTLP/gRPC; encrypted if the endpoint begins with https://. Raises TracingUnavailable."""
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise TracingUnavailable(
                "--otlp-endpoint needs the extra [otel]: pip install 'text-generation-server[otel]'"
            ) from error
        provider = TracerProvider(
            resource=Resource.create({"service.name": service_name}), shutdown_on_exit=False
        )
        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider)

    def close(self) -> None:
        """Send what is left, within a few seconds."""
        self._provider.force_flush(FLUSH_TIMEOUT_MS)
        self._provider.shutdown()

    def traced(self, handler: Handler, name: str, route: str) -> Handler:
        """The handler within a span that lasts until its response, stream or not, has been sent.

        A W3C `traceparent` of the request is the span's parent; `tracestate` is ignored.
        """

        async def answer(request: Request) -> Response:
            given = request.headers.get("traceparent")
            parent = self._propagator.extract({"traceparent": given} if given is not None else {})
            span = self._tracer.start_span(
                name, parent, kind=self._api.SpanKind.SERVER, attributes=attributes_of(request, route)
            )
            try:
                with self._api.use_span(span, record_exception=True, set_status_on_exception=True):
                    response = await handler(request)
            except BaseException:
                span.end()
                raise
            span.set_attribute("http.response.status_code", response.status_code)
            if response.status_code >= 500:
                span.set_status(self._api.StatusCode.ERROR)
            return _TracedResponse(response, self, span)

        return answer

    def generation(self, name: str, started_ns: int) -> "GenerationTrace":
        """Below what this task works for. Times are those of time.perf_counter_ns."""
        return GenerationTrace(self, name, started_ns)

    def span(self, name: str) -> "AbstractContextManager[Span]":
        """One that lasts as long as the block, below what this task works for."""
        return self._tracer.start_as_current_span(name)

    def start(self, name: str, started_ns: int, parent: "Span | None" = None) -> "Span":
        context = None if parent is None else self._api.set_span_in_context(parent)
        return self._tracer.start_span(name, context, start_time=self._epoch_ns + started_ns)

    def end(self, span: "Span", ended_ns: int) -> None:
        span.end(self._epoch_ns + ended_ns)

    def fail(self, span: "Span", message: str) -> None:
        span.set_status(self._api.Status(self._api.StatusCode.ERROR, message))

    def current(self) -> "Span":
        return self._api.get_current_span()

    def use(self, span: "Span") -> "AbstractContextManager[Span]":
        return self._api.use_span(span)

    def traceparent_of(self, span: "Span") -> str:
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self._api.set_span_in_context(span))
        return carrier["traceparent"]


class GenerationTrace:
    """The span of one generation. Its stages are recorded when they are over: nothing is done in between."""

    def __init__(self, tracing: Tracing, name: str, started_ns: int) -> None:
        self._tracing = tracing
        self._handler = tracing.current()
        self._span = tracing.start(name, started_ns)
        self.traceparent = tracing.traceparent_of(self._span)

    def use(self) -> "AbstractContextManager[Span]":
        return self._tracing.use(self._span)

    def record(self, name: str, started_ns: int, ended_ns: int) -> None:
        self._tracing.end(self._tracing.start(name, started_ns, self._span), ended_ns)

    def describe(self, attributes: Mapping[str, str]) -> None:
        """The handler's span tells it as well, as TGI's does; of several generations the last that ended."""
        self._span.set_attributes(attributes)
        self._handler.set_attributes(attributes)

    def fail(self, message: str) -> None:
        self._tracing.fail(self._span, message)
        self._tracing.fail(self._handler, message)

    def end(self, ended_ns: int) -> None:
        self._tracing.end(self._span, ended_ns)


class _TracedResponse(Response):
    """Another response, sent within its request's span."""

    def __init__(self, response: Response, tracing: Tracing, span: "Span") -> None:
        self.status_code = response.status_code
        self.background: BackgroundTask | None = None
        self.raw_headers = response.raw_headers
        self._response = response
        self._tracing = tracing
        self._span = span

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._tracing.use(self._span):
                await self._response(scope, receive, send)
        finally:
            self._span.end()


def attributes_of(request: Request, route: str) -> Mapping[str, str]:
    attributes = {
        "http.request.method": request.method,
        "http.route": route,
        "url.path": request.url.path,
        "url.scheme": request.url.scheme,
        "server.address": request.url.hostname or "",
    }
    if (agent := request.headers.get("user-agent")) is not None:
        attributes["user_agent.original"] = agent
    return attributes
