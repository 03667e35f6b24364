"""OpenAI's own clients, sync and async, drive what they have against a live server with the demo model."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from conftest import Launch
from server import Server

PROMPT = "What is the capital of France?"
MESSAGES: Any = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def server(launch: Launch) -> Iterator[Server]:
    with launch("--enable-prefill-logprobs", "--max-best-of", "4", model="demo") as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", timeout=60, max_retries=0) as made:
        yield made


def test_choices_of_one_seed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tgi", "messages": MESSAGES, "n": 3, "max_tokens": 12}
    asked |= {"temperature": 1.5, "seed": 11, "logprobs": True, "top_logprobs": 2}
    answer = client.chat.completions.create(**asked)
    again = client.chat.completions.create(**asked)
    contents = [choice.message.content for choice in answer.choices]
    assert len(set(contents)) > 1  # a confident model may repeat itself, but not every time
    assert contents == [choice.message.content for choice in again.choices]
    assert answer.usage is not None
    num_tokens = 0
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        num_tokens += len(choice.logprobs.content)
        for token in choice.logprobs.content:
            assert bytes(token.bytes or []).decode() == token.token
            assert len(token.top_logprobs) == 2
    assert answer.usage.completion_tokens == num_tokens


def test_a_stream_of_choices_is_what_is_not_streamed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tgi", "messages": MESSAGES, "n": 3, "max_tokens": 12}
    asked |= {"temperature": 1.5, "seed": 5, "logprobs": True}
    whole = client.chat.completions.create(**asked)
    contents, logprobs, reasons = ["", "", ""], [[], [], []], ["", "", ""]  # type: ignore[var-annotated]
    usage = None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            contents[choice.index] += choice.delta.content or ""
            if choice.logprobs is not None:
                logprobs[choice.index] += choice.logprobs.content
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert contents == [choice.message.content for choice in whole.choices]
    assert logprobs == [choice.logprobs.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_async_client_with_several_at_once(server: Server) -> None:
    async def ask() -> list[list[str | None]]:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="-", timeout=60, max_retries=0) as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model="tgi", messages=MESSAGES, n=3, seed=9, temperature=1.2, max_tokens=10
                    )
                    for _ in range(3)
                )
            )
            stream = await client.completions.create(
                model="tgi", prompt=PROMPT, n=2, max_tokens=16, temperature=0, stream=True
            )
            texts = ["", ""]
            async for chunk in stream:
                for choice in chunk.choices:
                    texts[choice.index] += choice.text
            assert texts[0] == texts[1]
            assert "Paris" in texts[0]
            return [[choice.message.content for choice in answer.choices] for answer in answers]

    first, second, third = asyncio.run(ask())
    assert first == second == third


def test_prompts_of_token_ids_and_usage(server: Server, client: openai.OpenAI) -> None:
    tokens = server.client.post("/tokenize", json={"inputs": PROMPT}).json()
    ids = [token["id"] for token in tokens]
    by_text = client.completions.create(model="tgi", prompt=PROMPT, max_tokens=12, temperature=0)
    by_ids = client.completions.create(model="tgi", prompt=ids, max_tokens=12, temperature=0)
    both = client.completions.create(model="tgi", prompt=[ids, ids[:-1]], max_tokens=12, temperature=0)
    assert by_ids.choices[0].text == by_text.choices[0].text == both.choices[0].text
    assert by_text.usage == by_ids.usage
    assert by_text.usage is not None
    assert by_text.usage.prompt_tokens == len(ids)
    with pytest.raises(openai.UnprocessableEntityError, match="token id 99999999 is not in"):
        client.completions.create(model="tgi", prompt=[99999999], max_tokens=1)


def test_echo_and_logprobs(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tgi", "prompt": PROMPT, "temperature": 0, "logprobs": 3}
    (echoed,) = client.completions.create(**asked, max_tokens=4, echo=True).choices
    (plain,) = client.completions.create(**asked, max_tokens=4).choices
    assert echoed.text == PROMPT + plain.text
    assert echoed.logprobs is not None
    assert plain.logprobs is not None
    tokens, logprobs = echoed.logprobs.tokens, echoed.logprobs.token_logprobs
    assert tokens is not None
    assert logprobs is not None
    assert logprobs[0] is None
    assert all(logprob is not None and logprob <= 0 for logprob in logprobs[1:])
    num_prompt_tokens = len(tokens) - 4
    assert logprobs[num_prompt_tokens:] == plain.logprobs.token_logprobs
    for choice in (echoed, plain):
        assert choice.logprobs is not None
        pairs = zip(choice.logprobs.tokens or [], choice.logprobs.text_offset or [], strict=True)
        shown = [(token, offset) for token, offset in pairs if not token.startswith("<")]
        assert all(choice.text[offset : offset + len(token)] == token for token, offset in shown)
    for token, top in zip(plain.logprobs.tokens or [], plain.logprobs.top_logprobs or [], strict=True):
        assert next(iter(top)) == token  # greedy: the best is the one
        assert len(top) == 3
    (scored,) = client.completions.create(**asked, max_tokens=0, echo=True).choices
    assert scored.logprobs is not None
    assert scored.logprobs.token_logprobs == logprobs[:num_prompt_tokens]


def test_best_of_gives_the_likeliest(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tgi", "prompt": PROMPT, "max_tokens": 10, "temperature": 1.3}
    asked |= {"seed": 3, "logprobs": 0}
    choices = client.completions.create(**asked, n=4).choices
    answer = client.completions.create(**asked, n=2, best_of=4)

    def mean(choice: Any) -> float:
        logprobs = choice.logprobs.token_logprobs
        return float(sum(logprobs) / len(logprobs))

    best = sorted(choices, key=mean, reverse=True)[:2]
    assert [choice.text for choice in answer.choices] == [choice.text for choice in best]
    assert [choice.index for choice in answer.choices] == [0, 1]


def test_logit_bias_bans_and_forces(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tgi", "prompt": PROMPT, "max_tokens": 3, "temperature": 0}
    forced = client.completions.create(**asked, logit_bias={"40": 100}, logprobs=0).choices[0]
    assert forced.logprobs is not None
    assert len(set(forced.logprobs.tokens or [])) == 1
    plain = client.completions.create(**asked).choices[0].text
    assert forced.text != plain
    likely = client.completions.create(
        **{**asked, "temperature": 1.9}, seed=1, extra_body={"min_p": 1.0}
    ).choices[0]
    assert likely.text == plain


def test_errors_are_readable(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as error:
        client.chat.completions.create(model="tgi", messages=MESSAGES, logprobs=True, top_logprobs=20)
    message = "Input validation error: `top_logprobs` must be >= 0 and <= 5. Given: 20"
    assert message in str(error.value)
    assert error.value.type == "invalid_request_error"
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError, match="The model `gpt-4` does not exist") as missing:
        client.models.retrieve("gpt-4")
    assert missing.value.code == "model_not_found"


def test_cancel_ends_a_stream(server: Server, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tgi", "prompt": PROMPT, "max_tokens": 200}
    stream = client.completions.create(
        **asked, stream=True, extra_body={"ignore_eos": True}, extra_headers={"x-request-id": "the/one"}
    )
    assert stream.response.headers["x-request-id"] == "the/one"
    next(stream)
    answer: list[httpx.Response] = []
    canceller = threading.Thread(
        target=lambda: answer.append(server.client.post("/v1/requests/the/one/cancel"))
    )
    canceller.start()
    chunks = list(stream)
    canceller.join()
    assert chunks[-1].choices[0].finish_reason == ("stop" if answer[0].status_code == 200 else "length")
    server.wait_for_metric("tgi_kv_blocks_used", 0)
