"""What people build on: the Hub's client, litellm and LangChain against a live server."""

import asyncio
import json
import warnings
from collections.abc import Iterator
from typing import Any

import huggingface_hub
import pytest
from pydantic import BaseModel

from conftest import Launch
from server import Server

with pytest.MonkeyPatch.context() as environment, warnings.catch_warnings():
    environment.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else its import asks the network for prices
    warnings.simplefilter("ignore")  # of their own code, while they are imported
    import litellm
    from langchain_core.messages import AIMessageChunk, HumanMessage
    from langchain_huggingface import ChatHuggingFace, HuggingFaceEndpoint
    from langchain_openai import ChatOpenAI, OpenAI

pytestmark = [
    # What these libraries do among themselves.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

PROMPT = "What is the capital of France?"
MESSAGES: list[dict[str, str]] = [{"role": "user", "content": PROMPT}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome"]},
        "year": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["city", "year"],
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather of a city", "parameters": SCHEMA},
}


class Weather(BaseModel):
    """The weather of a city."""

    is_warm: bool
    degrees: int


@pytest.fixture(scope="module")
def server(launch: Launch) -> Iterator[Server]:
    with launch("--enable-prefill-logprobs", "--max-best-of", "4", model="demo") as started:
        yield started


def check_arguments(text: str) -> None:
    arguments = json.loads(text)
    assert arguments["city"] in ("Paris", "Rome")
    assert 0 <= arguments["year"] <= 9


# huggingface_hub


@pytest.fixture(scope="module")
def hub(server: Server) -> huggingface_hub.InferenceClient:
    return huggingface_hub.InferenceClient(server.url, timeout=60)


def test_hub_text_generation(hub: huggingface_hub.InferenceClient) -> None:
    answer = hub.text_generation(
        PROMPT, details=True, decoder_input_details=True, max_new_tokens=20, top_n_tokens=2, best_of=1
    )
    assert "Paris" in answer.generated_text
    assert answer.details is not None
    assert answer.details.generated_tokens == len(answer.details.tokens)
    assert answer.details.prefill[1].logprob is not None
    events = list(hub.text_generation(PROMPT, details=True, stream=True, max_new_tokens=20))
    assert events[-1].generated_text == answer.generated_text
    assert [event.token.id for event in events] == [token.id for token in answer.details.tokens]
    assert hub.text_generation(PROMPT, max_new_tokens=20, return_full_text=True).startswith(PROMPT)
    texts = hub.text_generation(PROMPT, stream=True, max_new_tokens=20)
    assert "Paris" in "".join(texts)


def test_hub_sampling_and_grammar(hub: huggingface_hub.InferenceClient) -> None:
    drawn: dict[str, Any] = {"do_sample": True, "seed": 3, "temperature": 1.2, "top_k": 40, "top_p": 0.9}
    drawn |= {"repetition_penalty": 1.1, "frequency_penalty": 0.1, "max_new_tokens": 12, "stop": ["\n\n"]}
    assert hub.text_generation(PROMPT, **drawn) == hub.text_generation(PROMPT, **drawn)
    grammar: Any = {"type": "json", "value": SCHEMA}
    asked: dict[str, Any] = {"grammar": grammar, "max_new_tokens": 60, "return_full_text": False}
    check_arguments(hub.text_generation(PROMPT, **asked))


def test_hub_chat(hub: huggingface_hub.InferenceClient) -> None:
    asked: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 20, "temperature": 0.0, "seed": 1}
    answer = hub.chat_completion(**asked, logprobs=True, top_logprobs=2)
    choice = answer.choices[0]
    assert "Paris" in str(choice.message.content)
    assert choice.logprobs is not None
    assert len(choice.logprobs.content[0].top_logprobs) == 2
    chunks: Any = hub.chat_completion(**asked, stream=True, stream_options={"include_usage": True})
    text, usage = "", None
    for chunk in chunks:
        usage = chunk.usage or usage
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert text == choice.message.content
    assert usage is not None
    assert usage.completion_tokens == answer.usage.completion_tokens
    formatted = hub.chat_completion(
        MESSAGES,
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}},
    )
    check_arguments(str(formatted.choices[0].message.content))


def test_hub_errors_say_why(hub: huggingface_hub.InferenceClient) -> None:
    with pytest.raises(huggingface_hub.errors.ValidationError, match="cannot be empty"):
        hub.text_generation("", max_new_tokens=5)


def test_hub_async(server: Server) -> None:
    async def ask() -> tuple[str, str]:
        async with huggingface_hub.AsyncInferenceClient(server.url, timeout=60) as client:
            whole = await client.text_generation(PROMPT, max_new_tokens=20)
            pieces = [
                piece async for piece in await client.text_generation(PROMPT, max_new_tokens=20, stream=True)
            ]
            return whole, "".join(pieces)

    whole, streamed = asyncio.run(ask())
    assert "Paris" in whole
    assert "Paris" in streamed


# litellm


@pytest.fixture
def lite(server: Server) -> dict[str, Any]:
    """As OpenAI's API under another address."""
    return {
        "model": "openai/tgi",
        "api_base": f"{server.url}/v1",
        "api_key": "-",
        "messages": MESSAGES,
        "temperature": 0,
        "max_tokens": 20,
        "timeout": 60,
        "num_retries": 0,
    }


def test_litellm_chat(lite: dict[str, Any]) -> None:
    answer = litellm.completion(**lite, logprobs=True, top_logprobs=2)
    choice = answer.choices[0]
    assert "Paris" in choice.message.content
    assert choice.finish_reason == "stop"
    assert len(choice.logprobs.content) == answer.usage.completion_tokens
    chunks = list(litellm.completion(**lite, stream=True, stream_options={"include_usage": True}))
    rebuilt = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
    assert rebuilt.choices[0].message.content == choice.message.content
    assert rebuilt.usage.completion_tokens == answer.usage.completion_tokens
    several = litellm.completion(**lite | {"n": 2, "temperature": 1.3, "seed": 5, "stop": ["\n\n"]})
    assert len(several.choices) == 2


def test_litellm_async(lite: dict[str, Any]) -> None:
    async def ask() -> tuple[str, str]:
        whole = await litellm.acompletion(**lite)
        pieces = [
            chunk.choices[0].delta.content or ""
            async for chunk in await litellm.acompletion(**lite, stream=True)
        ]
        return whole.choices[0].message.content, "".join(pieces)

    whole, streamed = asyncio.run(ask())
    assert whole == streamed


def test_litellm_tools_and_structure(lite: dict[str, Any]) -> None:
    asked = lite | {"max_tokens": 60, "tools": [WEATHER]}
    forced = {"type": "function", "function": {"name": "get_weather"}}
    answer = litellm.completion(**asked, tool_choice=forced)
    (call,) = answer.choices[0].message.tool_calls
    check_arguments(call.function.arguments)
    chunks = list(litellm.completion(**asked, tool_choice=forced, stream=True))
    (streamed,) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    assert (streamed.function.name, streamed.function.arguments) == ("get_weather", call.function.arguments)
    structure = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}
    formatted = litellm.completion(**lite | {"max_tokens": 60, "response_format": structure})
    check_arguments(formatted.choices[0].message.content)


def test_litellm_text(lite: dict[str, Any]) -> None:
    asked = {name: value for name, value in lite.items() if name != "messages"}
    asked |= {"model": "text-completion-openai/tgi", "prompt": PROMPT}
    answer = litellm.text_completion(**asked)
    assert "Paris" in answer.choices[0].text
    pieces = [chunk.choices[0].text or "" for chunk in litellm.text_completion(**asked, stream=True)]
    assert "".join(pieces) == answer.choices[0].text


def test_litellm_errors_are_its_own(lite: dict[str, Any]) -> None:
    with pytest.raises(litellm.exceptions.BadRequestError, match="`max_new_tokens` must be strictly"):
        litellm.completion(**lite | {"max_tokens": 0})


# LangChain


@pytest.fixture
def chat_openai(server: Server) -> Any:
    fields: dict[str, Any] = {
        "model": "tgi",
        "base_url": f"{server.url}/v1",
        "api_key": "-",
        "temperature": 0,
    }
    return ChatOpenAI(**fields, max_completion_tokens=60, max_retries=0, timeout=60, stream_usage=True)


def test_langchain_openai_chat(chat_openai: Any) -> None:
    answer = chat_openai.invoke(PROMPT)
    assert "Paris" in answer.content
    assert answer.response_metadata["finish_reason"] == "stop"
    whole = AIMessageChunk(content="")
    for chunk in chat_openai.stream([HumanMessage(PROMPT)]):
        whole += chunk
    assert whole.content == answer.content
    assert whole.usage_metadata == answer.usage_metadata
    texts = [message.content for message in chat_openai.batch([PROMPT, "What is the capital of Italy?"])]
    assert "Paris" in texts[0]
    assert "Rome" in texts[1]
    logprobs = chat_openai.bind(logprobs=True).invoke(PROMPT).response_metadata["logprobs"]["content"]
    assert len(logprobs) == answer.usage_metadata["output_tokens"]


def test_langchain_openai_tools_and_structure(chat_openai: Any) -> None:
    (call,) = chat_openai.bind_tools([Weather], tool_choice="Weather").invoke(PROMPT).tool_calls
    assert call["name"] == "Weather"
    assert isinstance(Weather(**call["args"]), Weather)
    for method in ("json_schema", "function_calling"):
        structured = chat_openai.with_structured_output(Weather, method=method).invoke(PROMPT)
        assert isinstance(structured, Weather)


def test_langchain_openai_async(chat_openai: Any) -> None:
    async def ask() -> str:
        return "".join([chunk.content async for chunk in chat_openai.astream(PROMPT)])

    assert "Paris" in asyncio.run(ask())


def test_langchain_openai_completions(server: Server) -> None:
    fields: dict[str, Any] = {
        "model": "tgi",
        "base_url": f"{server.url}/v1",
        "api_key": "-",
        "temperature": 0,
    }
    model = OpenAI(**fields, max_tokens=20, max_retries=0)
    assert "Paris" in model.invoke(PROMPT)
    assert "".join(model.stream(PROMPT)) == model.invoke(PROMPT)


@pytest.fixture
def endpoint(server: Server) -> Any:
    return HuggingFaceEndpoint(
        endpoint_url=server.url, task="text-generation", max_new_tokens=20, do_sample=False, timeout=60
    )


def test_langchain_huggingface_endpoint(endpoint: Any) -> None:
    answer = endpoint.invoke(PROMPT)
    assert "Paris" in answer
    # The pieces of a native stream spell the end token out, as TGI's do.
    assert "".join(endpoint.stream(PROMPT)) == answer + "<|end|>"


def test_langchain_huggingface_chat(endpoint: Any) -> None:
    model = ChatHuggingFace(llm=endpoint, model_id="tgi", temperature=0.0, max_tokens=20)
    answer = model.invoke([HumanMessage(PROMPT)])
    assert "Paris" in answer.content
    streamed = "".join(str(chunk.content) for chunk in model.stream([HumanMessage(PROMPT)]))
    assert streamed == answer.content
