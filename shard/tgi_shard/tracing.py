"""A span for each traced sequence, from the plan that adds it to the one that drops it.

The router sends the trace context with the sequence (`AddSequence.traceparent`). A step costs nothing for it:
only plans that add or drop are looked at.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # an extra: shards must start without it
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

    from tgi_proto import generate_pb2 as pb

FLUSH_TIMEOUT_MS = 3000
METHOD = "tgi.v1.TextGeneration"


class TracingUnavailable(Exception):
    """The packages that traces need are not installed; the text names the extra."""


class SequenceSpans:
    """provider: of spans; `close` shuts it down."""

    def __init__(self, provider: "TracerProvider", rank: int) -> None:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._kind = SpanKind.SERVER
        self._propagator = TraceContextTextMapPropagator()
        self._provider = provider
        self._tracer = provider.get_tracer("tgi_shard")
        self._rank = rank
        self._open: dict[int, Span] = {}

    @classmethod
    def to_collector(cls, endpoint: str, service_name: str, rank: int) -> "SequenceSpans":
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
        return cls(provider, rank)

    def follow(self, plan: "pb.StepPlan") -> None:
        for sequence_id in plan.drop_sequence_ids:
            self._end(sequence_id)
        for added in plan.add:
            if not added.traceparent:
                continue
            parent = self._propagator.extract({"traceparent": added.traceparent})
            self._open[added.sequence_id] = self._tracer.start_span(
                "sequence",
                parent,
                kind=self._kind,
                attributes={
                    "rpc.system": "grpc",
                    "rpc.service": METHOD,
                    "rpc.method": "Run",
                    "rank": self._rank,
                    "sequence_id": added.sequence_id,
                    "prompt_tokens": len(added.prompt_token_ids),
                    "output_tokens": len(added.output_token_ids),  # more than 0: it was interrupted
                    "cached_tokens": added.num_cached_tokens,
                },
            )

    def end_all(self) -> None:
        """The stream is over, and with it every sequence."""
        for sequence_id in list(self._open):
            self._end(sequence_id)

    def close(self) -> None:
        """Send what is left, within a few seconds."""
        self.end_all()
        self._provider.force_flush(FLUSH_TIMEOUT_MS)
        self._provider.shutdown()

    def _end(self, sequence_id: int) -> None:
        if (span := self._open.pop(sequence_id, None)) is not None:
            span.end()
