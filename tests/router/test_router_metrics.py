"""The exposition text: what dashboards made for TGI read."""

from tgi_router.metrics import Metrics


def lines(metrics: Metrics) -> list[str]:
    return metrics.render().decode().splitlines()


def test_counters_have_no_total_suffix() -> None:
    metrics = Metrics()
    metrics.tgi_request_count.inc()
    metrics.tgi_batch_inference_count.labels("prefill").inc(2)
    text = lines(metrics)
    assert "# HELP tgi_request_count Total number of requests" in text
    assert "# TYPE tgi_request_count counter" in text
    assert "tgi_request_count 1" in text
    assert 'tgi_batch_inference_count{method="prefill"} 2' in text
    assert not any(
        "_total " in line and not line.startswith("#") and "kv_blocks" not in line for line in text
    )
    assert not any("_created" in line for line in text)


def test_labelled_metrics_appear_with_their_first_use() -> None:
    metrics = Metrics()
    assert not any("tgi_request_failure" in line for line in lines(metrics))
    metrics.tgi_request_failure.labels("overloaded").inc()
    assert 'tgi_request_failure{err="overloaded"} 1' in lines(metrics)


def test_duration_buckets_are_tgi_s() -> None:
    metrics = Metrics()
    metrics.tgi_request_duration.observe(0.0002)
    bounds = [line.split('"')[1] for line in lines(metrics) if line.startswith("tgi_request_duration_bucket")]
    assert bounds[:4] == ["0.00015000000000000001", "0.00022500000000000002", "0.0003375", "0.00050625"]
    assert bounds[-1] == "+Inf"
    assert len(bounds) == 36
    assert 'tgi_request_duration_bucket{le="0.00015000000000000001"} 0' in lines(metrics)
    assert 'tgi_request_duration_bucket{le="+Inf"} 1' in lines(metrics)
    assert "tgi_request_duration_sum 0.0002" in lines(metrics)


def test_length_buckets_follow_the_limits() -> None:
    metrics = Metrics()
    metrics.open_lengths(4100, 200)
    metrics.tgi_request_input_length.observe(41)
    text = lines(metrics)
    assert 'tgi_request_input_length_bucket{le="41"} 1' in text
    assert 'tgi_request_generated_tokens_bucket{le="200"} 0' in text
    assert len([line for line in text if line.startswith("tgi_request_max_new_tokens_bucket")]) == 101


def test_two_routers_share_nothing() -> None:
    first, second = Metrics(), Metrics()
    first.tgi_request_count.inc()
    assert "tgi_request_count 0" in lines(second)
