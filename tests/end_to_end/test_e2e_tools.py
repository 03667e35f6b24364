"""Forced calls of tools by a model with random weights, through the clients that people have."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import openai
import pytest

from conftest import Launch
from server import Server

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 10},
                "unit": {"enum": ["celsius", "fahrenheit", "東京 🗼"]},
                "days": {
                    "type": "array",
                    "items": {"type": "integer", "minimum": 0, "maximum": 9},
                    "maxItems": 3,
                },
            },
            "required": ["city", "unit", "days"],
        },
    },
}
NAMED: dict[str, Any] = {"type": "function", "function": {"name": "get_weather"}}
TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {{ message.content }}\n{% endfor %}"
    "{% for tool in tools or [] %}{{ tool.function.name }} <tool_call>{% endfor %}"
)


@pytest.fixture(scope="module")
def server(launch: Launch, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    config = tmp_path_factory.mktemp("template") / "tokenizer_config.json"
    fields = json.loads((tiny_llama / "tokenizer_config.json").read_text())
    config.write_text(json.dumps({**fields, "chat_template": TEMPLATE}))
    with launch("--tokenizer-config-path", str(config)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", timeout=60, max_retries=0)


def question(seed: int, **fields: Any) -> dict[str, Any]:
    return {
        "model": "tgi",
        "messages": [{"role": "user", "content": "How is the weather?"}],
        "tools": [TOOL],
        "seed": seed,
        "temperature": 1.5,
        "max_tokens": 150,
        **fields,
    }


def check_arguments(text: str) -> None:
    arguments = json.loads(text)
    assert list(arguments) == ["city", "unit", "days"]
    assert len(arguments["city"]) <= 10
    assert arguments["unit"] in TOOL["function"]["parameters"]["properties"]["unit"]["enum"]
    assert len(arguments["days"]) <= 3
    assert all(0 <= day <= 9 for day in arguments["days"])


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    "fields", [{"tool_choice": NAMED}, {"tool_choice": "required", "parallel_tool_calls": False}]
)
def test_a_forced_call_has_valid_arguments(client: openai.OpenAI, fields: dict[str, Any], seed: int) -> None:
    answer = client.chat.completions.create(**question(seed, **fields))
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather"
    check_arguments(call.function.arguments)
    with client.chat.completions.stream(**question(seed, **fields)) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls is not None
    (streamed,) = final.message.tool_calls
    assert streamed.function.arguments == call.function.arguments
    assert streamed.id.startswith("call_")


def test_the_hub_s_client(server: Server) -> None:
    client: Any = huggingface_hub.InferenceClient(base_url=server.url, timeout=60)
    fields: dict[str, Any] = {
        "messages": question(1)["messages"],
        "tools": [TOOL],
        "max_tokens": 150,
        "seed": 4,
    }
    answer = client.chat_completion(**fields, tool_choice=NAMED)
    call = answer.choices[0].message.tool_calls[0]
    check_arguments(call.function.arguments)
    pieces = ""
    for chunk in client.chat_completion(**fields, tool_choice=NAMED, stream=True):
        for piece in chunk.choices[0].delta.tool_calls or ():
            pieces += piece.function.arguments
    assert pieces == call.function.arguments


def test_free_answers_with_tools_stay_answers(client: openai.OpenAI) -> None:
    """Random words are no call; the two ways to ask agree."""
    answer = client.chat.completions.create(**question(5, max_tokens=30))
    assert answer.choices[0].finish_reason == "length"
    chunks = client.chat.completions.create(**question(5, max_tokens=30, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer.choices[0].message.content != ""
