"""The clients that people have, against a live server with the demo model."""

import asyncio

import openai
import pytest
import text_generation

from server import Server

PROMPT = "What is the capital of France?"


@pytest.fixture(scope="module")
def openai_client(demo_server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="-", timeout=60, max_retries=0)


def test_text_generation_client(demo_server: Server) -> None:
    client = text_generation.Client(demo_server.url, timeout=60)
    answer = client.generate(PROMPT, max_new_tokens=20, decoder_input_details=True, top_n_tokens=2)
    assert "Paris" in answer.generated_text
    assert answer.details.generated_tokens == len(answer.details.tokens) == len(answer.details.top_tokens)
    events = list(client.generate_stream(PROMPT, max_new_tokens=20))
    assert events[-1].generated_text == answer.generated_text
    assert [event.token.id for event in events] == [token.id for token in answer.details.tokens]


def test_text_generation_client_raises_its_own_validation_error(demo_server: Server) -> None:
    client = text_generation.Client(demo_server.url, timeout=60)
    with pytest.raises(text_generation.errors.ValidationError, match="`inputs` cannot be empty"):
        client.generate("", max_new_tokens=20)


def test_text_generation_async_client(demo_server: Server) -> None:
    async def ask() -> list[str]:
        client = text_generation.AsyncClient(demo_server.url, timeout=60)
        answers = await asyncio.gather(*(client.generate(PROMPT, max_new_tokens=20) for _ in range(4)))
        return [answer.generated_text for answer in answers]

    assert len(set(asyncio.run(ask()))) == 1


def test_text_generation_chat(demo_server: Server) -> None:
    client = text_generation.Client(demo_server.url, timeout=60)
    answer = client.chat(messages=[{"role": "user", "content": PROMPT}], max_tokens=20, temperature=0.0)
    assert "Paris" in answer.choices[0].message.content


def test_text_generation_chat_raises_its_own_validation_error(demo_server: Server) -> None:
    client = text_generation.Client(demo_server.url, timeout=60)
    with pytest.raises(text_generation.errors.ValidationError, match="`max_new_tokens` must be strictly"):
        client.chat(messages=[{"role": "user", "content": PROMPT}], max_tokens=0)


def test_openai_chat_streams_what_it_answers(openai_client: openai.OpenAI) -> None:
    question = {"model": "tgi", "messages": [{"role": "user", "content": PROMPT}], "temperature": 0}
    answer = openai_client.chat.completions.create(**question, max_tokens=20)  # type: ignore[call-overload]
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    chunks = list(
        openai_client.chat.completions.create(  # type: ignore[call-overload]
            **question, max_tokens=20, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].usage == answer.usage
    text = "".join(chunk.choices[0].delta.content for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content


def test_openai_completions(openai_client: openai.OpenAI) -> None:
    question = {"model": "tgi", "prompt": [PROMPT, "What is the capital of Italy?"], "temperature": 0}
    answer = openai_client.completions.create(**question, max_tokens=20)  # type: ignore[call-overload]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert "Paris" in answer.choices[0].text
    assert "Rome" in answer.choices[1].text
    texts = {0: "", 1: ""}
    for chunk in openai_client.completions.create(**question, max_tokens=20, stream=True):  # type: ignore[call-overload]
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {choice.index: choice.text for choice in answer.choices}


def test_openai_error_is_readable(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as error:
        openai_client.completions.create(model="tgi", prompt=PROMPT, max_tokens=0)
    message = "Input validation error: `max_new_tokens` must be strictly positive"
    assert message in str(error.value)
    assert error.value.body == {
        "message": message,
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }


def test_openai_lists_the_model(openai_client: openai.OpenAI) -> None:
    assert [model.id for model in openai_client.models.list()] == ["demo"]
