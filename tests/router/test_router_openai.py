"""OpenAI's routes beyond one plain choice, in process: n, best_of, echo, logprobs, ids, cancelling."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models

import tiny_tokenizers
from router_app import Running, running
from scripted_shard import ScriptedShard
from tgi_router.api.openai_logprobs import alternative_text
from tgi_router.request_id import MAX_LENGTH
from tgi_router.text.tokenizer import Tokenizer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
async def router(tmp_path: Path) -> AsyncIterator[Running]:
    async with running(tmp_path, enable_prefill_logprobs=True, max_concurrent_requests=30) as started:
        yield started


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    *blocks, done = response.text.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks if block != ":"]


async def complete(router: Running, **fields: Any) -> dict[str, Any]:
    response = await router.post(COMPLETIONS, {"prompt": "the one", "max_tokens": 5} | fields)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def refusal(router: Running, path: str, **fields: Any) -> str:
    body = MESSAGES if path == CHAT else {"prompt": "a"}
    response = await router.post(path, body | {"max_tokens": 2} | fields)
    assert response.status_code == 422, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"
    return str(response.json()["error"]["message"])


def sent(shard: ScriptedShard) -> list[Any]:
    """The sequences that plans have added, as the wire had them; kept by `keep_sequences`."""
    return shard.added  # type: ignore[attr-defined, no-any-return]


def keep_sequences(shard: ScriptedShard) -> None:
    shard.added = []  # type: ignore[attr-defined]
    add = shard._add

    def keep(sequence: Any) -> None:
        sent(shard).append(sequence)
        add(sequence)

    shard._add = keep  # type: ignore[assignment, method-assign]


# --- how many


async def test_choices_share_the_seed_and_differ_in_their_number(router: Running) -> None:
    keep_sequences(router.shard)
    body = await complete(router, prompt=["a", "bc"], n=3, seed=7)
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    assert body["usage"] == {"prompt_tokens": 2 + 3, "completion_tokens": 30, "total_tokens": 35}
    assert [(one.sampling.seed, one.sampling.choice) for one in sent(router.shard)] == [
        (7, choice) for _ in range(2) for choice in range(3)
    ]
    chat = (await router.post(CHAT, MESSAGES | {"n": 3, "max_tokens": 4})).json()
    assert [choice["index"] for choice in chat["choices"]] == [0, 1, 2]
    assert chat["usage"]["completion_tokens"] == 12
    assert len({one.sampling.seed for one in sent(router.shard)[6:]}) == 3  # none given: each its own


async def test_best_of_counts_what_it_generated(router: Running) -> None:
    response = await router.post(COMPLETIONS, {"prompt": "a", "max_tokens": 4, "best_of": 2, "seed": 1})
    body = response.json()
    assert len(body["choices"]) == 1
    assert body["usage"]["completion_tokens"] == 8
    assert response.headers["x-generated-tokens"] == "4"
    assert await refusal(router, COMPLETIONS, best_of=2, stream=True) == (
        "Input validation error: `best_of` != 1 is not supported when streaming tokens"
    )
    assert "<= 2. Given: 3" in await refusal(router, COMPLETIONS, best_of=3)
    assert "`best_of` must be >= `n`" in await refusal(router, COMPLETIONS, best_of=1, n=2)
    # No choosing: as many as are given.
    assert len((await complete(router, n=3, best_of=3))["choices"]) == 3


async def test_limits_of_n(router: Running) -> None:
    for path in (COMPLETIONS, CHAT):
        assert await refusal(router, path, n=31) == (
            "Input validation error: `n` must be >= 1 and <= 30. Given: 31"
        )
        assert "Given: 0" in await refusal(router, path, n=0)
    assert (await router.post(COMPLETIONS, {"prompt": ["a", "b"], "n": 16})).status_code == 429


# --- prompts


async def test_prompts_of_token_ids(router: Running) -> None:
    ids = tiny_tokenizers.ids("one")
    keep_sequences(router.shard)
    body = await complete(router, prompt=ids)
    assert body["usage"]["prompt_tokens"] == 3  # no BOS is added
    both = await complete(router, prompt=[ids, [tiny_tokenizers.BOS_ID, *ids]])
    assert [list(one.prompt_token_ids) for one in sent(router.shard)] == [
        ids,
        ids,
        [tiny_tokenizers.BOS_ID, *ids],
    ]
    assert both["choices"][0]["text"] == body["choices"][0]["text"]
    vocab_size = tiny_tokenizers.VOCAB_SIZE
    for wrong in (vocab_size, -1):
        assert await refusal(router, COMPLETIONS, prompt=[3, wrong]) == (
            f"Input validation error: token id {wrong} is not in the model's vocabulary of {vocab_size}"
        )
    assert "`inputs` cannot be empty" in await refusal(router, COMPLETIONS, prompt=[[]])
    assert "do not mix" in await refusal(router, COMPLETIONS, prompt=[3, "a"])
    assert "maximum allowed batch size of 4" in await refusal(router, COMPLETIONS, prompt=[[3]] * 5)


async def test_echo(router: Running) -> None:
    plain = (await complete(router))["choices"][0]["text"]
    assert (await complete(router, echo=True))["choices"][0]["text"] == "the one" + plain
    ids = [tiny_tokenizers.BOS_ID, *tiny_tokenizers.ids("one")]
    assert (await complete(router, prompt=ids, echo=True))["choices"][0]["text"].startswith("<s>one")
    body = await complete(router, echo=True, max_tokens=0)
    assert body["choices"] == [{"index": 0, "text": "the one", "logprobs": None, "finish_reason": "length"}]
    assert body["usage"] == {"prompt_tokens": 6, "completion_tokens": 0, "total_tokens": 6}
    assert "strictly positive" in await refusal(router, COMPLETIONS, max_tokens=0)


async def test_echo_with_logprobs_of_the_prompt(router: Running) -> None:
    (choice,) = (await complete(router, echo=True, logprobs=1, max_tokens=3))["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"][:6] == ["<s>", "th", "e", " ", "on", "e"]
    assert logprobs["token_logprobs"] == [None, -1, -2, -3, -4, -5, -0.5, -0.5, -0.5]
    assert logprobs["top_logprobs"][:2] == [None, {"th": -1}]
    assert logprobs["text_offset"][:7] == [0, 0, 2, 3, 4, 6, 7]
    check_offsets(choice)
    scored = (await complete(router, echo=True, logprobs=0, max_tokens=0))["choices"][0]["logprobs"]
    assert scored["token_logprobs"] == logprobs["token_logprobs"][:6]


async def test_echoed_logprobs_need_a_server_that_has_them(tmp_path: Path) -> None:
    async with running(tmp_path) as router:
        message = await refusal(router, COMPLETIONS, echo=True, logprobs=1)
        assert "--enable-prefill-logprobs" in message
        assert (await complete(router, echo=True))["choices"][0]["text"].startswith("the one")


def check_offsets(choice: dict[str, Any]) -> None:
    logprobs = choice["logprobs"]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if token not in tiny_tokenizers.SPECIAL:
            assert choice["text"][offset : offset + len(token)] == token


# --- logprobs


async def test_completion_logprobs(router: Running) -> None:
    (choice,) = (await complete(router, logprobs=2, max_tokens=4))["choices"]
    logprobs = choice["logprobs"]
    assert list(logprobs) == ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
    assert (
        "".join(token for token in logprobs["tokens"] if token not in tiny_tokenizers.SPECIAL)
        == (choice["text"])
    )
    assert logprobs["token_logprobs"] == [-0.5] * 4
    for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        assert list(top.values()) == [-0.5, -1.5]
        assert next(iter(top)) == token
    check_offsets(choice)
    (choice,) = (await complete(router, logprobs=0, max_tokens=4))["choices"]
    assert [list(top.values()) for top in choice["logprobs"]["top_logprobs"]] == [[-0.5]] * 4
    assert "`logprobs` must be >= 0 and <= 5. Given: 6" in await refusal(router, COMPLETIONS, logprobs=6)
    assert "`top_logprobs` must be >= 0 and <= 5" in await refusal(router, CHAT, top_logprobs=20)


async def test_chat_logprobs_have_bytes(router: Running) -> None:
    body = MESSAGES | {"max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    (choice,) = (await router.post(CHAT, body)).json()["choices"]
    content = choice["logprobs"]["content"]
    assert all(bytes(entry["bytes"]).decode() == entry["token"] for entry in content)
    for entry in content:
        assert entry["top_logprobs"][0] == {key: entry[key] for key in ("token", "logprob", "bytes")}
        assert len(entry["top_logprobs"]) == 3


# --- what reaches the shards


async def test_sampling_fields_reach_the_shards(router: Running) -> None:
    keep_sequences(router.shard)
    fields = {
        "min_p": 0.125,
        "top_k": 7,
        "repetition_penalty": 1.5,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "logit_bias": {"5": -100, "6": 1.5},
        "max_tokens": 1,
    }
    await router.post(COMPLETIONS, {"prompt": "a"} | fields)
    await router.post(CHAT, MESSAGES | fields)
    for added in sent(router.shard):
        sampling = added.sampling
        assert (sampling.min_p, sampling.top_k, sampling.repetition_penalty) == (0.125, 7, 1.5)
        assert (sampling.output_frequency_penalty, sampling.output_presence_penalty) == (0.5, -0.5)
        assert list(sampling.logit_bias_token_ids) == [5, 6]
        assert list(sampling.logit_bias_values) == [-100, 1.5]
    sent(router.shard).clear()
    off = {"top_k": -1, "min_p": 0, "logit_bias": [1.0], "user": "u", "max_completion_tokens": 1}
    for top_k in (-1, 0):
        for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHAT, MESSAGES)):
            assert (await router.post(path, body | off | {"top_k": top_k})).status_code == 200
    assert len(sent(router.shard)) == 4
    assert all(added.sampling.top_k == 0 for added in sent(router.shard))
    assert not any(added.sampling.logit_bias_token_ids for added in sent(router.shard))


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_sampling_fields_that_are_refused(router: Running, path: str) -> None:
    vocab_size = tiny_tokenizers.VOCAB_SIZE
    assert f"token id {vocab_size}," in await refusal(router, path, logit_bias={str(vocab_size): 1})
    assert "must be token ids. Given: `x`" in await refusal(router, path, logit_bias={"x": 1})
    assert "must be token ids" in await refusal(router, path, logit_bias={"01": 1})
    assert "`logit_bias` must be >= -100.0 and <= 100.0" in await refusal(router, path, logit_bias={"1": 101})
    assert "`min_p` must be >= 0.0 and <= 1.0" in await refusal(router, path, min_p=1.5)
    assert "`top_k` must be strictly positive" in await refusal(router, path, top_k=-2)
    assert "duplicate field `max_tokens`" in await refusal(router, path, max_completion_tokens=2)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_ignore_eos(tmp_path: Path, path: str) -> None:
    every_id = tuple(range(tiny_tokenizers.VOCAB_SIZE))
    shard = ScriptedShard(vocab_size=tiny_tokenizers.VOCAB_SIZE, num_blocks=256, eos_token_ids=every_id)
    async with running(tmp_path, shard=shard) as router:
        body = (MESSAGES if path == CHAT else {"prompt": "a"}) | {"max_tokens": 5}
        for ignores, num_tokens, reason in ((False, 1, "stop"), (True, 5, "length")):
            reply = (await router.post(path, body | {"ignore_eos": ignores})).json()
            assert reply["usage"]["completion_tokens"] == num_tokens
            assert reply["choices"][0]["finish_reason"] == reason


async def test_template_fields(tmp_path: Path) -> None:
    template = (
        "{% for message in messages %}[{{ message.role }}] {{ message.content }}|{% endfor %}"
        "{% if add_generation_prompt %}[go]{% endif %}{% if loud %}!{% endif %}"
    )
    async with running(tmp_path, chat_template_text=template) as router:

        async def num_characters(**fields: Any) -> int:
            response = await router.post(CHAT, MESSAGES | {"max_tokens": 1} | fields)
            assert response.status_code == 200, response.text
            return int(response.headers["x-compute-characters"])

        spoken = "[user] hi|"
        assert await num_characters() == len(spoken + "[go]")
        assert await num_characters(add_generation_prompt=False) == len(spoken)
        assert await num_characters(chat_template_kwargs={"loud": True}) == len(spoken + "[go]!")
        assert await num_characters(continue_final_message=True) == len("[user] hi")
        both = [*MESSAGES["messages"], {"role": "assistant", "content": "I"}]
        assert await num_characters(messages=both) == len("[user] hi|[assistant] I")
        assert await num_characters(messages=both, continue_final_message=False) == len(
            "[user] hi|[assistant] I|[go]"
        )
        refused = await refusal(router, CHAT, add_generation_prompt=True, continue_final_message=True)
        assert "`continue_final_message`" in refused


# --- streams


def random_fields(rng: random.Random, path: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"max_tokens": rng.randrange(1, 14), "n": rng.choice([1, 1, 2, 3])}
    options: dict[str, Any] = {
        "stop": rng.choice(["a", ["ab", "e"], "zz", ["th", "an", " "]]),
        "seed": rng.randrange(2**64),
        "ignore_eos": True,
        "temperature": rng.choice([0, 0.5, 1]),
        "logit_bias": {str(rng.randrange(60)): 1},
    }
    if path == CHAT:
        options |= {"logprobs": True, "top_logprobs": rng.randrange(6)}
        fields["messages"] = [{"role": "user", "content": "".join(rng.choices("abc de", k=9))}]
    else:
        options |= {"logprobs": rng.randrange(6), "echo": True}
        texts = ["".join(rng.choices("the on", k=rng.randrange(1, 20))) for _ in range(rng.randrange(1, 4))]
        fields["prompt"] = rng.choice([texts[0], texts, [tiny_tokenizers.ids(text) for text in texts]])
        if "echo" in options and rng.random() < 0.1:
            fields |= {"max_tokens": 0, "echo": True}
    return fields | {key: value for key, value in options.items() if rng.random() < 0.5}


def fold_completion(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for piece in event["choices"]:
            choice = choices.setdefault(piece["index"], piece | {"text": "", "logprobs": None})
            assert choice["finish_reason"] is None or choice["text"] == ""
            choice["text"] += piece["text"]
            choice["finish_reason"] = piece["finish_reason"]
            if piece["logprobs"] is not None:
                lists = choice["logprobs"] or {key: [] for key in piece["logprobs"]}
                choice["logprobs"] = {key: lists[key] + piece["logprobs"][key] for key in lists}
    return [choices[index] for index in sorted(choices)]


def fold_chat(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for piece in event["choices"]:
            index, delta = piece["index"], piece["delta"]
            choice = choices.setdefault(
                index,
                {
                    "index": index,
                    "message": {"role": "assistant", "content": ""},
                    "logprobs": None,
                    "finish_reason": None,
                },
            )
            assert choice["finish_reason"] is None
            choice["message"]["content"] += delta.get("content") or ""
            choice["finish_reason"] = piece["finish_reason"]
            if piece["logprobs"] is not None:
                content = (choice["logprobs"] or {"content": []})["content"]
                choice["logprobs"] = {"content": content + piece["logprobs"]["content"]}
    return [choices[index] for index in sorted(choices)]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("seed", range(4))
async def test_streamed_is_what_is_not_streamed(router: Running, path: str, seed: int) -> None:
    rng = random.Random(f"{path} {seed}")
    fold = fold_chat if path == CHAT else fold_completion
    for _ in range(12):
        body = random_fields(rng, path)
        whole = await router.post(path, body)
        assert whole.status_code == 200, (whole.text, body)
        streaming = body | {"stream": True, "stream_options": {"include_usage": True}}
        *events, usage = events_of(await router.post(path, streaming))
        assert fold(events) == whole.json()["choices"], body
        assert usage["choices"] == []
        assert usage["usage"] == whole.json()["usage"]
        assert {event["usage"] for event in events} == {None}


async def test_usage_is_what_tokenize_counts(router: Running) -> None:
    text = "the one, and another"
    tokens = (await router.post("/tokenize", {"inputs": text})).json()
    assert (await complete(router, prompt=text, n=2))["usage"]["prompt_tokens"] == len(tokens)


# --- ids of requests, cancelling


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [
        ("my-id 7/8", True),
        ("x" * MAX_LENGTH, True),
        ("x" * (MAX_LENGTH + 1), False),
        ("\u00e9", False),
        (None, False),
    ],
)
async def test_every_response_tells_its_request_id(router: Running, given: str | None, is_kept: bool) -> None:
    headers = {} if given is None else {b"x-request-id": given.encode("latin-1")}
    generate = {"inputs": "a", "parameters": {"max_new_tokens": 1}}
    for path, body, status in (
        ("/generate", generate, 200),
        ("/generate_stream", generate, 200),
        ("/", generate, 200),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 1}, 200),
        (CHAT, MESSAGES | {"max_tokens": 1, "stream": True}, 200),
        (CHAT, MESSAGES | {"n": 0}, 422),
        (CHAT, {}, 422),
    ):
        response = await router.client.post(path, json=body, headers=headers)
        assert response.status_code == status
        own_id = response.headers["x-request-id"]
        assert (own_id == given) is is_kept
        assert own_id


async def cancel_when_running(router: Running, request_id: str) -> None:
    async with asyncio.timeout(10):
        while True:
            response = await router.client.post(f"/v1/requests/{request_id}/cancel")
            if response.status_code == 200:
                assert response.json() == {"id": request_id, "cancelled": True}
                return
            assert response.status_code == 404
            assert response.json()["error"]["message"] == f"No request `{request_id}` is running"
            await asyncio.sleep(0.01)


@pytest.fixture
async def slow(tmp_path: Path) -> AsyncIterator[Running]:
    async with running(tmp_path, step_s=0.02) as started:
        yield started


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, MESSAGES | {"n": 2, "logprobs": True}),
        (COMPLETIONS, {"prompt": ["a", "b"], "logprobs": 1, "echo": False}),
    ],
)
async def test_cancel_ends_answers_where_they_are(
    slow: Running, path: str, body: dict[str, Any], stream: bool
) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    headers = {"x-request-id": "a/b"}
    asked = asyncio.create_task(
        slow.client.post(path, json=body | {"max_tokens": 100} | options, headers=headers)
    )
    await asyncio.sleep(0.15)
    await cancel_when_running(slow, "a/b")
    response = await asked
    assert response.status_code == 200
    if stream:
        *events, usage = events_of(response)
        choices = fold_chat(events) if path == CHAT else fold_completion(events)
        assert usage["usage"]["completion_tokens"] < 100
    else:
        choices = response.json()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["stop", "stop"]
    async with asyncio.timeout(5):
        while slow.shard.sequences:  # noqa: ASYNC110 (the shard tells nobody)
            await asyncio.sleep(0.01)
    assert (await slow.client.post("/v1/requests/a/b/cancel")).status_code == 404
    metrics = (await slow.client.get("/metrics")).text
    assert 'tgi_request_failure{err="dropped"}' in metrics


async def test_cancel_of_a_native_request_is_an_error(slow: Running) -> None:
    body = {"inputs": "a", "parameters": {"max_new_tokens": 100}}
    for path in ("/generate", "/generate_stream"):
        asked = asyncio.create_task(slow.client.post(path, json=body, headers={"x-request-id": "mine"}))
        await cancel_when_running(slow, "mine")
        response = await asked
        expected = {"error": "Request was cancelled", "error_type": "cancelled"}
        if path == "/generate":
            assert response.status_code == 499
            assert response.json() == expected
        else:
            last = response.text.removesuffix("\n\n").split("\n\n")[-1]
            assert json.loads(last.removeprefix("data: ")) == expected


async def test_cancel_needs_the_key(tmp_path: Path) -> None:
    async with running(tmp_path, api_key="k") as router:
        assert (await router.client.post("/v1/requests/x/cancel")).status_code == 401
        headers = {"authorization": "Bearer k"}
        assert (await router.client.post("/v1/requests/x/cancel", headers=headers)).status_code == 404


async def test_failures_in_a_stream_tell_the_real_code(
    router: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("out of memory")

    begin = router.step_loop.submit

    def submit(request: Any, listener: Any) -> int:
        sequence_id = begin(request, listener)
        asyncio.get_running_loop().call_soon(
            router.step_loop._fail, router.step_loop._sequences[sequence_id], "out of memory"
        )
        return sequence_id

    monkeypatch.setattr(router.step_loop, "submit", submit)
    for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHAT, MESSAGES)):
        (event,) = events_of(await router.post(path, body | {"stream": True, "max_tokens": 9}))
        assert event["error"]["http_status_code"] == 424
        assert "out of memory" in event["error"]["message"]
        response = await router.post(path, body | {"max_tokens": 9})
        assert response.status_code == 424
        assert response.json()["error"]["type"] == "server_error"
        assert response.json()["error_type"] == "generation"


# --- models


async def test_one_model(tmp_path: Path) -> None:
    async with running(tmp_path, served_model_name="some/deep/model") as router:
        response = await router.client.get("/v1/models/some/deep/model")
        assert response.json()["id"] == "some/deep/model"
        assert response.json() == (await router.client.get("/v1/models")).json()["data"][0]
        response = await router.client.get("/v1/models/gpt-4")
        assert response.status_code == 404
        assert response.json()["error"] == {
            "message": "The model `gpt-4` does not exist",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }


def test_bytes_of_tokens_that_are_parts_of_characters() -> None:
    euro = "€".encode()
    for pieces, decoder in (
        (["â", "Ĥ", "¬", "Ġa"], decoders.ByteLevel()),
        (
            [f"<0x{byte:02X}>" for byte in euro] + ["▁a"],
            decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
        ),
    ):
        fast = FastTokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
        fast.decoder = decoder
        tokenizer = Tokenizer(fast, {}, num_workers=1)
        assert b"".join(map(tokenizer.token_bytes, range(4))) == euro + b" a"
        assert alternative_text(tokenizer, 0) == "\\xe2"
        assert alternative_text(tokenizer, 3) == " a"
        tokenizer.close()
