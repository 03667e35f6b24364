"""One request's answer does not depend on the others, nor on the number of shards; nothing leaks."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from conftest import Launch
from server import Server

PROMPT = "The quick brown fox jumps over the lazy dog and"
GREEDY = {"max_new_tokens": 60}
SAMPLED = {"max_new_tokens": 60, "seed": 1234, "temperature": 0.9, "top_k": 50, "top_p": 0.95}


def other_requests(number: int) -> list[tuple[str, dict[str, Any]]]:
    """Requests of every kind and length."""
    rng = random.Random(0)
    requests: list[tuple[str, dict[str, Any]]] = []
    for index in range(number):
        prompt = "".join(rng.choice("abcdefgh ") for _ in range(rng.randrange(1, 200)))
        parameters: dict[str, Any] = {"max_new_tokens": rng.randrange(1, 100)}
        if index % 3 == 1:
            parameters |= {"seed": index, "temperature": 1.3, "typical_p": 0.9}
        if index % 3 == 2:
            parameters |= {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "top_n_tokens": 3}
        requests.append((prompt, parameters))
    return requests


def answers_alone_and_among_others(server: Server) -> list[str]:
    alone = [server.text(PROMPT, **GREEDY), server.text(PROMPT, **SAMPLED)]
    with ThreadPoolExecutor(33) as pool:
        others = [pool.submit(server.generate, prompt, **more) for prompt, more in other_requests(31)]
        among = [pool.submit(server.text, PROMPT, **GREEDY), pool.submit(server.text, PROMPT, **SAMPLED)]
        for other in others:
            other.result()
        assert [answer.result() for answer in among] == alone
    return alone


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_mamba"])
def test_the_same_answer_alone_among_others_and_on_two_shards(
    launch: Launch, model: str, request: pytest.FixtureRequest
) -> None:
    path = str(request.getfixturevalue(model))
    with launch(model=path) as server:
        on_one = answers_alone_and_among_others(server)
        check_many_streams(server)
    with launch("--num-shard", "2", model=path) as server:
        assert answers_alone_and_among_others(server) == on_one


def check_many_streams(server: Server) -> None:
    """64 streams at once complete, and every block comes back."""
    with ThreadPoolExecutor(64) as pool:
        streams = list(pool.map(lambda i: list(server.stream(f"{i} {PROMPT}", max_new_tokens=40)), range(64)))
    for events in streams:
        assert len(events) == 40
        assert [event["index"] for event in events] == list(range(1, 41))
        assert events[-1]["details"]["finish_reason"] == "length"
    server.wait_for_metric("tgi_kv_blocks_used", 0)
    assert server.metric("tgi_queue_size") == 0


def test_preemption_changes_no_answer(launch: Launch) -> None:
    """A KV cache that holds a fraction of the requests: they take turns, and answer as if alone."""
    with launch("--max-batch-total-tokens", "512", "--max-total-tokens", "256") as server:
        requests = [(f"{i} {PROMPT}", {"max_new_tokens": 120}) for i in range(12)]
        alone = [server.text(prompt, **parameters) for prompt, parameters in requests]
        with ThreadPoolExecutor(12) as pool:
            together = list(pool.map(lambda request: server.text(request[0], **request[1]), requests))
        assert together == alone
        assert server.metric("tgi_preemptions") > 0
        server.wait_for_metric("tgi_kv_blocks_used", 0)


@pytest.mark.parametrize("num_shard", [1, 2])
def test_prompt_logprobs_do_not_depend_on_chunks(launch: Launch, num_shard: int) -> None:
    args = ("--enable-prefill-logprobs", "--num-shard", str(num_shard))
    prefills = []
    for budget in ("4096", "16"):
        with launch(*args, "--max-batch-prefill-tokens", budget, "--max-concurrent-requests", "4") as server:
            answer = server.generate(PROMPT * 5, max_new_tokens=2, decoder_input_details=True)
            prefills.append(answer["details"]["prefill"])
    assert prefills[0][0]["logprob"] is None
    assert len(prefills[0]) > 100
    for whole, chunked in zip(*prefills, strict=True):
        assert whole["id"] == chunked["id"]
        if whole["logprob"] is not None:
            assert whole["logprob"] == pytest.approx(chunked["logprob"], abs=1e-4)


def test_a_recurrent_models_states_are_slots(launch: Launch, tiny_mamba: Path) -> None:
    """A cap on tokens caps states; prompts in chunks beside decodes; prompt logprobs; no prefix shared."""
    limits = ("--max-total-tokens", "256", "--max-batch-total-tokens", "1024")
    budget = ("--max-batch-prefill-tokens", "16", "--max-concurrent-requests", "16")
    args = (*limits, *budget, "--enable-prefill-logprobs")
    with launch(*args, model=str(tiny_mamba)) as server:
        assert server.metric("tgi_kv_blocks_total") == 4
        assert server.metric("tgi_batch_max_total_tokens") == 1024
        requests = [
            (f"{i} {PROMPT}", {"max_new_tokens": 60, "decoder_input_details": True}) for i in range(12)
        ]
        alone = [server.generate(prompt, **parameters) for prompt, parameters in requests]
        with ThreadPoolExecutor(12) as pool:
            together = list(pool.map(lambda request: server.generate(request[0], **request[1]), requests))
        for one, other in zip(alone, together, strict=True):
            assert one["generated_text"] == other["generated_text"]
            logprobs = [
                [token["logprob"] for token in answer["details"]["prefill"][1:]] for answer in (one, other)
            ]
            assert len(logprobs[0]) > 40
            assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)
        assert server.metric("tgi_prefix_cache_hit_tokens") == 0
        assert server.metric("tgi_preemptions") == 0
        server.wait_for_metric("tgi_kv_blocks_used", 0)
