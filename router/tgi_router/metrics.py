"""Every metric of the router: its name, labels and buckets, and the text that Prometheus reads.

The text differs from the client library's own in two ways that dashboards made for TGI rely on: counters
carry no `_total` suffix, and whole bucket bounds print without `.0`.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; charset=utf-8"


def _geometric(start: float, factor: float, count: int) -> tuple[float, ...]:
    """start * factor^k for k = 1 … count, multiplied up step by step so that the digits are TGI's."""
    bounds = []
    bound = start
    for _ in range(count):
        bound *= factor
        bounds.append(bound)
    return tuple(bounds)


def _percents(maximum: int) -> tuple[float, ...]:
    """A hundred even steps up to `maximum`."""
    return tuple(maximum / 100 * step for step in range(1, 101))


DURATION_BUCKETS = _geometric(0.0001, 1.5, 35)  # seconds
BATCH_SIZE_BUCKETS = tuple(float(size) for size in range(1, 1025))


class Metrics:
    """One attribute a metric, named like it; a registry of its own, so that routers can share a process.

    The histograms over lengths take their buckets from the model's limits: `open_lengths` makes them, later.
    """

    tgi_request_input_length: Histogram
    tgi_request_generated_tokens: Histogram
    tgi_request_max_new_tokens: Histogram

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        # One request of a client.
        self.tgi_request_count = self._counter("tgi_request_count", "Total number of requests")
        self.tgi_request_success = self._counter("tgi_request_success", "Number of successful requests")
        # err: overloaded, validation, template, generation, incomplete, dropped
        self.tgi_request_failure = self._counter("tgi_request_failure", "Number of failed requests", ["err"])
        self.tgi_request_duration = self._duration("tgi_request_duration", "Request duration")
        self.tgi_request_validation_duration = self._duration(
            "tgi_request_validation_duration", "Request validation duration"
        )
        self.tgi_request_queue_duration = self._duration(
            "tgi_request_queue_duration", "Request queue duration"
        )
        self.tgi_request_inference_duration = self._duration(
            "tgi_request_inference_duration", "Request inference duration"
        )
        self.tgi_request_mean_time_per_token_duration = self._duration(
            "tgi_request_mean_time_per_token_duration", "Mean time per token per request"
        )

        # A stream as its reader sees it: not in TGI.
        self.tgi_time_to_first_token_duration = self._duration(
            "tgi_time_to_first_token_duration", "From the request's arrival to its first token"
        )
        self.tgi_inter_token_duration = TokenHistogram(
            "tgi_inter_token_duration", "Time between two tokens of an answer", DURATION_BUCKETS
        )
        self.registry.register(self.tgi_inter_token_duration)

        # The queue and the batch that runs.
        self.tgi_queue_size = self._gauge("tgi_queue_size", "Current queue size")
        self.tgi_batch_current_size = self._gauge("tgi_batch_current_size", "Current batch size")
        self.tgi_batch_current_max_tokens = self._gauge(
            "tgi_batch_current_max_tokens", "Maximum tokens for the current batch"
        )
        self.tgi_batch_max_total_tokens = self._gauge(
            "tgi_batch_max_total_tokens", "Maximum tokens that the KV cache holds"
        )
        self.tgi_batch_next_size = self._histogram(
            "tgi_batch_next_size", "Batch size of the next batch", BATCH_SIZE_BUCKETS
        )

        # Steps. method: "prefill" (a prompt chunk is in the step) or "decode".
        self.tgi_batch_inference_count = self._counter(
            "tgi_batch_inference_count", "Inference calls per method (prefill or decode)", ["method"]
        )
        self.tgi_batch_inference_success = self._counter(
            "tgi_batch_inference_success",
            "Number of successful inference calls per method (prefill or decode)",
            ["method"],
        )
        self.tgi_batch_inference_failure = self._counter(
            "tgi_batch_inference_failure",
            "Number of failed inference calls per method (prefill or decode)",
            ["method"],
        )
        self.tgi_batch_inference_duration = self._duration(
            "tgi_batch_inference_duration", "Batch inference duration", ["method"]
        )
        self.tgi_batch_forward_duration = self._duration(
            "tgi_batch_forward_duration", "Batch forward duration per method (prefill or decode)", ["method"]
        )
        self.tgi_batch_decode_duration = self._duration(
            "tgi_batch_decode_duration",
            "Time spent decoding a batch per method (prefill or decode)",
            ["method"],
        )
        self.tgi_batch_filter_duration = self._duration(
            "tgi_batch_filter_duration",
            "Time spent filtering batches and sending generated tokens per method (prefill or decode)",
            ["method"],
        )
        # reason: chunking (a sequence joined a running batch)
        self.tgi_batch_concat = self._counter(
            "tgi_batch_concat", "Sequences that joined a running batch", ["reason"]
        )

        # method: always "decode"
        self.tgi_batch_concat_duration = self._duration(
            "tgi_batch_concat_duration", "Time to plan a step in which sequences join others", ["method"]
        )

        # KV blocks, the prefix cache, survival: not in TGI.
        self.tgi_kv_blocks_total = self._gauge("tgi_kv_blocks_total", "KV cache blocks")
        self.tgi_kv_blocks_used = self._gauge("tgi_kv_blocks_used", "KV cache blocks held by live sequences")
        self.tgi_prefix_cache_blocks = self._gauge(
            "tgi_prefix_cache_blocks", "KV cache blocks that only the prefix cache holds"
        )
        self.tgi_prefix_cache_hit_tokens = self._counter(
            "tgi_prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache"
        )
        self.tgi_preemptions = self._counter(
            "tgi_preemptions", "Sequences that gave their blocks back to others"
        )
        self.tgi_recoveries = self._counter("tgi_recoveries", "Times the shards came back and went on")

    def open_lengths(self, max_input_tokens: int, max_total_tokens: int) -> None:
        """Make the histograms whose buckets follow from the limits. Once, before the first request."""
        self.tgi_request_input_length = self._histogram(
            "tgi_request_input_length", "Input token length per request", _percents(max_input_tokens)
        )
        self.tgi_request_generated_tokens = self._histogram(
            "tgi_request_generated_tokens", "Generated tokens per request", _percents(max_total_tokens)
        )
        self.tgi_request_max_new_tokens = self._histogram(
            "tgi_request_max_new_tokens", "Maximum new tokens per request", _percents(max_total_tokens)
        )

    def render(self) -> bytes:
        """The text exposition format, version 0.0.4."""
        return "".join(
            line for metric in self.registry.collect() for line in _exposition_lines(metric)
        ).encode()

    def _counter(self, name: str, help_text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(name, help_text, labels, registry=self.registry)

    def _gauge(self, name: str, help_text: str) -> Gauge:
        return Gauge(name, help_text, registry=self.registry)

    def _duration(self, name: str, help_text: str, labels: Sequence[str] = ()) -> Histogram:
        return Histogram(name, help_text, labels, buckets=DURATION_BUCKETS, registry=self.registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, help_text, buckets=buckets, registry=self.registry)


class TokenHistogram(Collector):
    """A histogram without labels, cheap to observe (well below a microsecond): it is told every token."""

    def __init__(self, name: str, help_text: str, buckets: tuple[float, ...]) -> None:
        self._name = name
        self._help_text = help_text
        self._buckets = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._buckets, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[Metric]:
        bounds = [*(repr(bucket) for bucket in self._buckets), "+Inf"]
        cumulative = zip(bounds, accumulate(self._counts), strict=True)
        yield HistogramMetricFamily(
            self._name, self._help_text, [(bound, float(count)) for bound, count in cumulative], self._sum
        )


def _exposition_lines(metric: Metric) -> Iterator[str]:
    samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
    if not samples:  # a labelled metric before its first use
        return
    yield f"# HELP {metric.name} {metric.documentation}\n# TYPE {metric.name} {metric.type}\n"
    for sample in samples:
        name = metric.name if metric.type == "counter" else sample.name
        labels = ",".join(
            f'{key}="{_number(float(value)) if key == "le" else _escape(value)}"'
            for key, value in sample.labels.items()
        )
        yield (
            f"{name}{{{labels}}} {_number(sample.value)}\n" if labels else f"{name} {_number(sample.value)}\n"
        )


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    if value == float("inf"):
        return "+Inf"
    return str(int(value)) if value.is_integer() else repr(value)
