"""The HTTP surface, in process: real step loop, scripted shard behind real gRPC, the contract's bodies."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import tiny_tokenizers
from router_app import Running, running
from scripted_shard import ScriptedShard
from tgi_router.text.tokenizer import Encoded

NATIVE = ("/generate", "/generate_stream", "/")
OPENAI = ("/v1/completions", "/v1/chat/completions")
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
async def router(tmp_path: Path) -> AsyncIterator[Running]:
    async with running(tmp_path) as started:
        yield started


def frames(response: httpx.Response) -> list[Any]:
    """The events of a stream; comments left out, the last `[DONE]` as a string."""
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.text.endswith("\n\n")
    events = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        if block == ":":
            continue
        assert block.startswith("data: ")
        assert "\n" not in block
        data = block.removeprefix("data: ")
        events.append(data if data == "[DONE]" else json.loads(data))
    return events


def openai_error(message: str, error_type: str) -> dict[str, Any]:
    detail = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return {"error": detail, "error_type": error_type}


def native(**parameters: Any) -> dict[str, Any]:
    return {"inputs": "the one", "parameters": {"max_new_tokens": 8} | parameters}


# TGI's own routes


async def test_generate_with_details(router: Running) -> None:
    response = await router.post("/generate", native(details=True, top_n_tokens=2))
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["generated_text", "details"]
    details = body["details"]
    assert list(details) == ["finish_reason", "generated_tokens", "seed", "prefill", "tokens", "top_tokens"]
    assert details["finish_reason"] == "length"
    assert details["generated_tokens"] == len(details["tokens"]) == len(details["top_tokens"]) == 8
    assert details["seed"] is None  # greedy
    assert details["prefill"] == []  # asked for, but not enabled on this server
    assert list(details["tokens"][0]) == ["id", "text", "logprob", "special"]
    assert (
        "".join(token["text"] for token in details["tokens"] if not token["special"])
        == body["generated_text"]
    )
    assert [len(top) for top in details["top_tokens"]] == [2] * 8
    assert " " not in response.text.replace(body["generated_text"], "").split('"tokens"')[0]


async def test_generate_headers(router: Running) -> None:
    headers = (await router.post("/generate", native())).headers
    assert headers["x-compute-type"] == "1-test"
    assert headers["x-compute-characters"] == "7"
    assert headers["x-prompt-tokens"] == "6"
    assert headers["x-generated-tokens"] == "8"
    assert 0 < float(headers["x-compute-time"]) < 10
    assert "e" not in headers["x-compute-time"]
    times = [
        int(headers[f"x-{name}"])
        for name in ("total-time", "validation-time", "queue-time", "inference-time", "time-per-token")
    ]
    assert sum(times[1:4]) <= times[0]


async def test_no_details_unless_asked(router: Running) -> None:
    assert list((await router.post("/generate", native())).json()) == ["generated_text"]
    implied = (await router.post("/generate", native(decoder_input_details=True))).json()
    assert implied["details"]["prefill"] == []


async def test_without_parameters_it_samples(router: Running) -> None:
    response = await router.post("/generate", {"inputs": "ab"})
    assert response.status_code == 200
    body = native(details=True, do_sample=True)
    assert isinstance((await router.post("/generate", body)).json()["details"]["seed"], int)
    body = native(details=True, do_sample=True, seed=2**64 - 1)
    assert (await router.post("/generate", body)).json()["details"]["seed"] == 2**64 - 1


async def test_root_answers_in_an_array_with_the_prompt(router: Running) -> None:
    plain = (await router.post("/generate", native())).json()["generated_text"]
    assert (await router.post("/", native())).json() == [{"generated_text": "the one" + plain}]
    assert (await router.post("/", native(return_full_text=False))).json() == [{"generated_text": plain}]
    full = (await router.post("/generate", native(return_full_text=True))).json()
    assert full == {"generated_text": "the one" + plain}


async def test_stream_equals_the_answer_in_one_piece(router: Running) -> None:
    whole = (await router.post("/generate", native(details=True))).json()
    response = await router.post("/generate_stream", native(details=True))
    events = frames(response)
    assert response.headers["x-compute-characters"] == "7"
    assert [event["index"] for event in events] == list(range(1, 9))
    assert [event["token"] for event in events] == whole["details"]["tokens"]
    assert all(list(event) == ["index", "token", "generated_text", "details"] for event in events)
    assert all(event["generated_text"] is None and event["details"] is None for event in events[:-1])
    assert events[-1]["generated_text"] == whole["generated_text"]
    assert events[-1]["details"] == {
        "finish_reason": "length",
        "generated_tokens": 8,
        "seed": None,
        "input_length": 6,
    }
    assert "[DONE]" not in response.text


async def test_root_streams_like_generate_stream(router: Running) -> None:
    body = native(top_n_tokens=1, return_full_text=False) | {"stream": True}
    left, right = await router.post("/", body), await router.post("/generate_stream", body)
    assert left.text == right.text
    assert list(frames(left)[0]) == ["index", "token", "top_tokens", "generated_text", "details"]


async def test_best_of(router: Running) -> None:
    body = (await router.post("/generate", native(best_of=2, do_sample=True, details=True))).json()
    (other,) = body["details"]["best_of_sequences"]
    assert list(other) == [
        "generated_text",
        "finish_reason",
        "generated_tokens",
        "seed",
        "prefill",
        "tokens",
    ]
    assert other["seed"] != body["details"]["seed"]
    assert "top_tokens" not in body["details"]


async def test_stop_strings(router: Running) -> None:
    text = (await router.post("/generate", native())).json()["generated_text"]
    stop = text[3:5]
    body = (await router.post("/generate", native(stop=[stop], details=True))).json()
    assert body["generated_text"] == text[: text.index(stop) + 2]
    assert body["details"]["finish_reason"] == "stop_sequence"


async def test_prompt_logprobs_when_enabled(tmp_path: Path) -> None:
    async with running(tmp_path, enable_prefill_logprobs=True) as router:
        body = (await router.post("/generate", native(decoder_input_details=True))).json()
        prefill = body["details"]["prefill"]
        assert [token["text"] for token in prefill] == ["<s>", "th", "e", " ", "on", "e"]
        assert [token["logprob"] for token in prefill] == [None, -1.0, -2.0, -3.0, -4.0, -5.0]


async def test_end_of_sequence(tmp_path: Path) -> None:
    shard = ScriptedShard(vocab_size=tiny_tokenizers.VOCAB_SIZE, eos_token_ids=tuple(range(40)))
    async with running(tmp_path, shard=shard) as router:
        details = (await router.post("/generate", native(details=True, max_new_tokens=100))).json()["details"]
        assert details["finish_reason"] == "eos_token"
        assert details["tokens"][-1]["id"] < 40


async def test_tokenize(router: Running) -> None:
    response = await router.post("/tokenize", {"inputs": "Hé the"})
    assert response.json() == [
        {"id": 0, "text": "", "start": 0, "stop": 0},
        {"id": tiny_tokenizers.ids("H")[0], "text": "H", "start": 0, "stop": 1},
        {"id": tiny_tokenizers.ids(" ")[0], "text": " ", "start": 3, "stop": 4},
        {"id": tiny_tokenizers.vocabulary()["th"], "text": "th", "start": 4, "stop": 6},
        {"id": tiny_tokenizers.ids("e")[0], "text": "e", "start": 6, "stop": 7},
    ]
    assert not [name for name in response.headers if name.startswith("x-")]


# Errors


async def test_validation_error(router: Running) -> None:
    response = await router.post("/generate", native(top_p=1.0))
    assert response.status_code == 422
    assert response.json() == {
        "error": "Input validation error: `top_p` must be > 0.0 and < 1.0",
        "error_type": "validation",
    }
    assert [name for name in response.headers if name.startswith("x-")] == ["x-request-id"]


async def test_native_stream_errors_are_frames(router: Running) -> None:
    response = await router.post("/generate_stream", {"inputs": ""})
    assert response.status_code == 200
    assert frames(response) == [
        {"error": "Input validation error: `inputs` cannot be empty", "error_type": "validation"}
    ]
    (event,) = frames(await router.post("/generate_stream", native(best_of=2)))
    assert event["error"].endswith("`best_of` != 1 is not supported when streaming tokens")


async def test_overload(tmp_path: Path) -> None:
    async with running(tmp_path, max_concurrent_requests=2, step_s=0.01) as router:
        responses = await asyncio.gather(*(router.post("/generate", native()) for _ in range(5)))
        assert sorted(response.status_code for response in responses) == [200, 200, 429, 429, 429]
        refused = next(response for response in responses if response.status_code == 429)
        assert refused.json() == {"error": "Model is overloaded", "error_type": "overloaded"}
        assert refused.headers["retry-after"] == "1"
        blocked = asyncio.create_task(router.post("/generate", native(best_of=2, do_sample=True)))
        await asyncio.sleep(0.02)
        (event,) = frames(await router.post("/generate_stream", native()))
        assert event["error_type"] == "overloaded"
        for path, body in (
            ("/v1/completions", {"prompt": "a", "stream": True}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ):
            refused = await router.post(path, body)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert (await blocked).status_code == 200


@pytest.mark.parametrize("path", [*NATIVE, "/tokenize", *OPENAI])
async def test_bodies_that_cannot_be_read(router: Running, path: str) -> None:
    async def post(content: bytes, content_type: str | None = "application/json") -> tuple[int, str]:
        headers = {"content-type": content_type} if content_type else {}
        response = await router.client.post(path, content=content, headers=headers)
        if path in OPENAI:
            assert response.json()["error_type"] == "validation"
            return response.status_code, response.json()["error"]["message"]
        assert response.headers["content-type"] == "text/plain; charset=utf-8"
        return response.status_code, response.text

    unsupported = (415, "Expected request with `Content-Type: application/json`")
    assert await post(b"{}", None) == unsupported
    assert await post(b"{}", "text/plain") == unsupported
    assert (await post(b"{}", "application/vnd.api+json; charset=utf-8"))[0] == 422
    too_long = (413, "Failed to buffer the request body: length limit exceeded")
    assert await post(b" " * 20_001) == too_long
    status, text = await post(b"{")
    assert status == 400
    assert text.startswith("Failed to parse the request body as JSON: ")
    status, text = await post(b"{}")
    assert status == 422
    assert text.startswith("Failed to deserialize the JSON body into the target type: missing field `")


async def test_unknown_paths_and_methods(router: Running) -> None:
    response = await router.client.get("/nothing")
    assert (response.status_code, response.content) == (404, b"")
    response = await router.client.get("/generate")
    assert (response.status_code, response.content, response.headers["allow"]) == (405, b"", "POST")
    response = await router.client.delete("/")
    assert response.status_code == 405
    assert {"GET", "POST"} <= set(response.headers["allow"].split(", "))
    assert (await router.client.get("/health/")).status_code == 404


# What the server says about itself


async def test_health_info_models(router: Running) -> None:
    for path in ("/", "/health", "/ping"):
        response = await router.client.get(path)
        assert (response.status_code, response.content) == (200, b"")
    info = await router.client.get("/info")
    assert list(info.json()) == [
        "model_id",
        "model_sha",
        "model_pipeline_tag",
        "max_concurrent_requests",
        "max_best_of",
        "max_stop_sequences",
        "max_input_tokens",
        "max_total_tokens",
        "validation_workers",
        "max_client_batch_size",
        "router",
        "version",
        "sha",
        "docker_label",
    ]
    assert info.json()["max_input_tokens"] == 127
    assert info.json()["router"] == "text-generation-router"
    models = (await router.client.get("/v1/models")).json()
    created = models["data"][0].pop("created")
    assert created > 1_600_000_000
    assert models == {
        "object": "list",
        "data": [{"id": "some/model", "object": "model", "owned_by": "some/model"}],
    }


async def test_health_follows_the_shards(router: Running) -> None:
    router.step_loop._are_shards_back = False
    response = await router.client.get("/health")
    assert response.status_code == 503
    assert response.headers["x-health-state"] == "recovering"
    assert response.json() == {"error": "unhealthy", "error_type": "healthcheck", "state": "recovering"}


async def test_draining_answers_503(router: Running) -> None:
    router.app.generation.is_draining = True
    for path in (*NATIVE, *OPENAI):
        assert (await router.post(path, {})).status_code == 503
    assert (await router.client.get("/health")).status_code == 503
    assert (await router.client.get("/info")).status_code == 200


async def test_metrics_count_every_request_once(router: Running) -> None:
    await router.post("/generate", native(max_new_tokens=2))
    await router.post("/v1/chat/completions", CHAT | {"max_tokens": 2})
    await router.post("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2})
    await router.post("/generate", native(top_p=1.0))
    await router.post("/tokenize", {"inputs": "a"})
    response = await router.client.get("/metrics")
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    lines = response.text.splitlines()
    assert "tgi_request_count 4" in lines
    assert "tgi_request_success 4" in lines
    assert 'tgi_request_failure{err="validation"} 1' in lines
    assert 'tgi_request_generated_tokens_bucket{le="1.28"} 0' in lines
    assert "tgi_request_generated_tokens_sum 8" in lines
    assert "tgi_request_input_length_count 4" in lines


async def test_a_bug_is_a_500_that_clients_understand(
    router: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(router.step_loop, "submit", breaks)
    transport = httpx.ASGITransport(router.app.asgi, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        response = await client.post("/generate", json=native())
    assert response.status_code == 500
    assert response.json() == {"error": "Incomplete generation", "error_type": "incomplete_generation"}


# Keys and origins


async def test_the_key_is_compared_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring time proves nothing on a busy machine: the comparison made for it is what decides."""
    compared = []

    def compare(given: bytes, expected: bytes) -> bool:
        compared.append((given, expected))
        return given == expected

    monkeypatch.setattr("tgi_router.api.middleware.hmac.compare_digest", compare)
    async with running(tmp_path, api_key="Sesame") as router:
        for key, status in (("Sesam", 401), ("Sesame", 200)):
            reply = await router.post("/generate", native(), headers={"authorization": f"Bearer {key}"})
            assert reply.status_code == status
    assert compared == [(b"Sesam", b"Sesame"), (b"Sesame", b"Sesame")]


async def test_api_key(tmp_path: Path) -> None:
    async with running(tmp_path, api_key="Sesame") as router:

        async def status(path: str, key: str | None, method: str = "POST") -> int:
            headers = {b"authorization": key.encode("latin-1")} if key is not None else {}
            response = await router.client.request(method, path, headers=headers, json=native())
            if response.status_code == 401:
                assert response.content == b""
                assert response.headers["access-control-allow-origin"] == "*"
            return response.status_code

        for path in (*NATIVE, "/tokenize", *OPENAI):
            for key in (None, "Sesame", "Bearer sesame", "Bearer Sesame2", "Basic Sesame", "Bearer \u00e9"):
                assert await status(path, key) == 401, (path, key)
        for key in ("Bearer Sesame", "bearer Sesame"):
            assert await status("/generate", key) == 200
        assert await status("/generate", None, "GET") == 401
        assert await status("/generate", "Bearer Sesame", "GET") == 405
        assert await status("/nothing", None) == 404
        for path in ("/", "/health", "/info", "/metrics", "/v1/models"):
            assert await status(path, None, "GET") == 200


async def test_cors(tmp_path: Path) -> None:
    vary = "origin, access-control-request-method, access-control-request-headers"
    async with running(tmp_path / "any") as router:
        response = await router.client.get("/health", headers={"origin": "http://a"})
        assert response.headers["access-control-allow-origin"] == "*"
        response = await router.client.options("/nothing")
        assert (response.status_code, response.content) == (200, b"")
        assert response.headers["access-control-allow-methods"] == "GET,POST"
        assert response.headers["access-control-allow-headers"] == "content-type,authorization"
        assert response.headers["vary"] == vary
    async with running(tmp_path / "two", cors_allow_origin=("http://a", "http://b")) as router:
        response = await router.client.get("/health", headers={"origin": "http://b"})
        assert response.headers["access-control-allow-origin"] == "http://b"
        for origin in ({"origin": "http://c"}, {}):
            response = await router.client.get("/health", headers=origin)
            assert response.status_code == 200
            assert "access-control-allow-origin" not in response.headers
            assert response.headers["vary"] == vary


# OpenAI's routes


async def test_completions(router: Running) -> None:
    response = await router.post(
        "/v1/completions", {"prompt": ["the one", "b"], "max_tokens": 4, "temperature": 0}
    )
    body = response.json()
    assert list(body) == ["object", "id", "created", "model", "system_fingerprint", "choices", "usage"]
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["model"] == "some/model"
    assert body["system_fingerprint"].endswith("-native")
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert list(body["choices"][0]) == ["index", "text", "logprobs", "finish_reason"]
    assert body["usage"] == {"prompt_tokens": 8, "completion_tokens": 8, "total_tokens": 16}
    assert response.headers["x-prompt-tokens"] == "8"
    assert response.headers["x-generated-tokens"] == "8"
    assert response.headers["x-compute-characters"] == "8"


async def test_completions_stream(router: Running) -> None:
    body = {"prompt": ["the one", "b"], "max_tokens": 4, "temperature": 0}
    whole = (await router.post("/v1/completions", body)).json()
    *events, done = frames(await router.post("/v1/completions", body | {"stream": True}))
    assert done == "[DONE]"
    for index in (0, 1):
        of_prompt = [event for event in events if event["choices"][0]["index"] == index]
        text = "".join(event["choices"][0]["text"] for event in of_prompt)
        assert text == whole["choices"][index]["text"]
        for event in of_prompt[:-1]:
            assert list(event) == ["object", "id", "created", "choices", "model", "system_fingerprint"]
            assert event["choices"][0]["finish_reason"] is None
        last = of_prompt[-1]
        assert list(last) == ["object", "id", "created", "model", "system_fingerprint", "choices", "usage"]
        assert last["choices"][0]["finish_reason"] == "length"
        assert last["usage"]["completion_tokens"] == 4
    assert len({event["id"] for event in events}) == 1


async def test_completions_stream_usage_as_openai_has_it(router: Running) -> None:
    body = {"prompt": ["a", "b"], "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
    *events, usage, _ = frames(await router.post("/v1/completions", body))
    assert all(event["usage"] is None for event in events)
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8}
    body["stream_options"] = {"include_usage": False}
    assert not any("usage" in event for event in frames(await router.post("/v1/completions", body))[:-1])


async def test_openai_stop_strings_are_trimmed_in_both_forms(router: Running) -> None:
    body: dict[str, Any] = {"prompt": "the one", "max_tokens": 12, "temperature": 0}
    text = (await router.post("/v1/completions", body)).json()["choices"][0]["text"]
    stop = text[4:7]
    expected = text[: text.index(stop)]
    for form in (stop, [stop], ["never", stop]):
        choice = (await router.post("/v1/completions", body | {"stop": form})).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (expected, "stop")
    *events, _ = frames(await router.post("/v1/completions", body | {"stop": stop, "stream": True}))
    assert "".join(event["choices"][0]["text"] for event in events) == expected
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


async def test_completions_refusals(router: Running) -> None:
    async def refused(**fields: Any) -> dict[str, Any]:
        response = await router.post("/v1/completions", {"prompt": "a", "max_tokens": 1} | fields)
        assert response.status_code == 422
        body: dict[str, Any] = response.json()
        return body

    assert await refused(suffix="x") == openai_error(
        "Suffix is not supported and can be achieved by preprocessing the prompt.", "suffix not supported"
    )
    assert await refused(prompt=["a"] * 5) == openai_error(
        "Number of prompts exceeds the maximum allowed batch size of 4", "batch size exceeded"
    )
    neutral: dict[str, Any] = {
        "n": 1,
        "best_of": 1,
        "echo": False,
        "logprobs": None,
        "logit_bias": {},
        "top_p": 1,
        "user": "x",
    }
    assert (
        await router.post("/v1/completions", {"prompt": "a", "max_tokens": 1} | neutral)
    ).status_code == 200


async def test_chat(router: Running) -> None:
    response = await router.post(
        "/v1/chat/completions",
        CHAT
        | {"max_tokens": 3, "temperature": 0, "model": "my-adapter", "logprobs": True, "top_logprobs": 2},
    )
    body = response.json()
    assert list(body) == ["object", "id", "created", "model", "system_fingerprint", "choices", "usage"]
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "my-adapter"
    (choice,) = body["choices"]
    assert list(choice) == ["index", "message", "logprobs", "finish_reason"]
    assert list(choice["message"]) == ["role", "content"]
    assert choice["finish_reason"] == "length"
    content = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == choice["message"]["content"]
    assert [list(entry) for entry in content] == [["token", "logprob", "bytes", "top_logprobs"]] * 3
    assert [len(entry["top_logprobs"]) for entry in content] == [2, 2, 2]
    # BOS comes from the template and from nowhere else: <s>[user] hi</s>[assistant];
    # a token a character, but for "an".
    assert body["usage"]["prompt_tokens"] == 1 + len("[user] hi") + 1 + len("[assistant]") - 1
    assert response.headers["x-compute-characters"] == str(len("<s>[user] hi</s>[assistant]"))
    for model in (None, "tgi"):
        again = await router.post("/v1/chat/completions", CHAT | {"max_tokens": 1, "model": model})
        assert again.json()["model"] == "some/model"
        assert again.json()["choices"][0]["logprobs"] is None


async def test_chat_stream(router: Running) -> None:
    body = CHAT | {"max_tokens": 4, "temperature": 0}
    whole = (await router.post("/v1/chat/completions", body)).json()
    streaming = body | {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True}
    *events, usage, done = frames(await router.post("/v1/chat/completions", streaming))
    assert done == "[DONE]"
    keys = ["object", "id", "created", "model", "system_fingerprint", "choices", "usage"]
    assert all(list(event) == keys and event["usage"] is None for event in events)
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    deltas = [event["choices"][0] for event in events]
    assert all(list(delta) == ["index", "delta", "logprobs", "finish_reason"] for delta in deltas)
    assert all(delta["delta"]["role"] == "assistant" for delta in deltas)
    assert [delta["finish_reason"] for delta in deltas] == [None, None, None, "length"]
    assert "".join(delta["delta"]["content"] for delta in deltas) == whole["choices"][0]["message"]["content"]
    assert all(len(delta["logprobs"]["content"]) == 1 for delta in deltas)
    assert len({event["id"] for event in [*events, usage]}) == 1
    *events, done = frames(await router.post("/v1/chat/completions", body | {"stream": True}))
    assert done == "[DONE]"
    assert len(events) == 4


async def test_chat_continues_the_assistant(router: Running) -> None:
    messages = [*CHAT["messages"], {"role": "assistant", "content": "I think"}]
    response = await router.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1})
    assert response.headers["x-compute-characters"] == str(len("<s>[user] hi</s>[assistant] I think"))


async def test_chat_refusals(router: Running) -> None:
    async def refused(**fields: Any) -> dict[str, Any]:
        response = await router.post("/v1/chat/completions", CHAT | {"max_tokens": 1} | fields)
        assert response.status_code == 422
        body: dict[str, Any] = response.json()
        return body

    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    grammar = {"type": "json_object"}
    assert await refused(response_format=grammar, tools=[]) == openai_error(
        "Tool error: Grammar and tools are mutually exclusive", "tool_error"
    )
    assert "Tool with name g not found" in (await refused(tools=[tool], tool_choice="g"))["error"]["message"]
    assert (await refused(presence_penalty=-3))["error"]["message"].endswith(
        "`presence_penalty` must be >= -2.0 and <= 2.0"
    )
    # Before the stream begins, errors have their own status.
    assert (await refused(stream=True, top_p=2))["error_type"] == "validation"
    accepted: tuple[dict[str, Any], ...] = (
        {"response_format": {"type": "text"}, "tools": []},
        {"tools": [tool], "tool_choice": "none"},
        {"top_p": 1, "n": 1, "logit_bias": {}, "stream": None, "stream_options": None, "stop": None},
    )
    for fields in accepted:
        response = await router.post("/v1/chat/completions", CHAT | {"max_tokens": 1} | fields)
        assert response.status_code == 200, response.text


async def test_chat_without_a_template(tmp_path: Path) -> None:
    async with running(tmp_path, chat_template_text=None) as router:
        response = await router.post("/v1/chat/completions", CHAT)
        assert response.status_code == 422
        assert response.json() == openai_error("Template error: template not found", "template_error")
        assert (await router.post("/generate", native())).status_code == 200


async def test_chat_template_errors(tmp_path: Path) -> None:
    async with running(tmp_path, chat_template_text="{{ raise_exception('no') }}") as router:
        response = await router.post("/v1/chat/completions", CHAT | {"stream": True})
        assert response.status_code == 422
        assert response.json() == openai_error(
            "Template error: syntax error: no (in <string>:1)", "template_error"
        )


async def test_messages_reach_the_template_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}
            ],
        },
        {"role": "tool", "content": "c", "tool_call_id": "1", "name": "f"},
    ]
    seen: list[str] = []
    async with running(tmp_path, chat_template_text=template, max_total_tokens=800) as router:
        tokenizer = router.app.generation.tokenizer
        encode = tokenizer.encode

        async def listen(text: str, **options: bool) -> Encoded:
            seen.append(text)
            return await encode(text, **options)

        monkeypatch.setattr(tokenizer, "encode", listen)
        response = await router.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1})
        assert response.status_code == 200
    call = (
        '[{"id":"1","type":"function","function":{"description":null,"name":"f","arguments":"{\\"x\\":1}"}}]'
    )
    assert seen == [
        '{"role": "user", "content": "ab"}'
        + json.dumps({"role": "assistant", "content": call})
        + '{"role": "tool", "content": "c", "name": "f", "tool_call_id": "1"}'
    ]


async def test_many_streams_at_once_equal_each_alone(tmp_path: Path) -> None:
    async with running(tmp_path, max_concurrent_requests=32) as router:
        prompts = [f"prompt {letter}" for letter in "abcdefghijklmnopqrst"]
        alone = {
            prompt: (
                await router.post("/generate", {"inputs": prompt, "parameters": {"max_new_tokens": 9}})
            ).json()
            for prompt in prompts[:5]
        }
        responses = await asyncio.gather(
            *(
                router.post("/generate_stream", {"inputs": prompt, "parameters": {"max_new_tokens": 9}})
                for prompt in prompts
            )
        )
        for prompt, response in zip(prompts, responses, strict=True):
            events = frames(response)
            assert len(events) == 9
            if prompt in alone:
                assert events[-1]["generated_text"] == alone[prompt]["generated_text"]
