"""Tools and thoughts on /v1/chat/completions: a shard with a script, read whole and as a stream."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import tiny_tokenizers
from router_app import Running, running
from scripted_shard import ScriptedShard
from tgi_router.answer import Answer
from tgi_router.mailbox import Mailbox
from tgi_router.metrics import Metrics
from tgi_router.request import Request, SampledToken, Sampling
from tgi_router.text.tokenizer import Tokenizer
from tgi_router.text.tools import AUTO_PROMPT, FORCED_PROMPT, Offer, Tool

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
        },
        "strict": True,
    },
}
NOTHING = {"type": "function", "function": {"name": "f"}}
# What `tools` must look like is written by the template itself; `<tool_call>` shows the format.
TEMPLATE = (
    "{% if tools %}{{ tools | map(attribute='function.name') | join(' ') }} <tool_call>{% endif %}"
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.arguments.city }}{% endfor %}{% endfor %}"
)
CALL = '{"name": "get_weather", "arguments": {"city": "Rome", "unit": "C"}}'
ARGUMENTS = '{"city": "Rome", "unit": "C"}'


@asynccontextmanager
async def saying(folder: Path, text: str, **changes: Any) -> AsyncIterator[Running]:
    """A router whose model says this text, one character a token, and ends."""
    shard = ScriptedShard(
        vocab_size=tiny_tokenizers.VOCAB_SIZE,
        num_blocks=1024,
        max_total_tokens=1024,
        eos_token_ids=(tiny_tokenizers.EOS_ID,),
        script=(*tiny_tokenizers.ids(text), tiny_tokenizers.EOS_ID),
    )
    changes.setdefault("chat_template_text", TEMPLATE)
    async with running(folder, shard=shard, **changes) as router:
        yield router


async def ask(router: Running, **fields: Any) -> tuple[dict[str, Any], str]:
    """The message and its finish reason, whole; that of the stream is the same."""
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 300, "seed": 1} | fields
    response = await router.post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    streamed = await stream(router, body)
    assert [without_ids(streamed[0]), streamed[1]] == [
        without_ids(choice["message"]),
        choice["finish_reason"],
    ]
    return choice["message"], choice["finish_reason"]


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return {**message, "content": message["content"] or "", "tool_calls": calls}


async def stream(router: Running, body: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The fold of the chunks, as OpenAI's clients make it."""
    response = await router.post("/v1/chat/completions", body | {"stream": True, "logprobs": True})
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    reasons: list[str] = []
    num_tokens = 0
    for line in response.text.split("\n\n")[:-2]:
        choice = json.loads(line.removeprefix("data: "))["choices"][0]
        assert not reasons  # nothing follows the finish reason
        reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
        num_tokens += len((choice["logprobs"] or {"content": ()})["content"])
        delta = choice["delta"]
        assert delta["role"] == "assistant"
        message["content"] += delta.get("content", "")
        if "reasoning_content" in delta:
            message["reasoning_content"] = message.get("reasoning_content", "") + delta["reasoning_content"]
        for piece in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if piece["index"] == len(calls):
                calls.append(
                    {
                        "id": "",
                        "type": "function",
                        "function": {"description": None, "name": "", "arguments": ""},
                    }
                )
            call = calls[piece["index"]]
            call["id"] += piece["id"]
            call["function"]["name"] += piece["function"]["name"] or ""
            call["function"]["arguments"] += piece["function"]["arguments"]
    assert len(reasons) == 1
    assert num_tokens > 0
    return message, reasons[0]


async def test_calls_are_found_in_what_the_model_writes(tmp_path: Path) -> None:
    text = f"I look.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{CALL}</tool_call>"
    async with saying(tmp_path, text) as router:
        message, reason = await ask(router, tools=[WEATHER, NOTHING])
        assert message["content"] == "I look."
        assert reason == "tool_calls"
        calls = message["tool_calls"]
        assert [call["function"] for call in calls] == [
            {"description": None, "name": "get_weather", "arguments": ARGUMENTS}
        ] * 2
        ids = [call["id"] for call in calls]
        assert len(set(ids)) == 2
        assert all(call_id.startswith("call_") for call_id in ids)

        message, _ = await ask(router, tools=[WEATHER], parallel_tool_calls=False)
        assert len(message["tool_calls"]) == 1
        # Without tools, or without that tool, it is text.
        without: tuple[dict[str, Any], ...] = (
            {},
            {"tools": []},
            {"tools": [WEATHER], "tool_choice": "none"},
            {"tools": [NOTHING]},
        )
        for fields in without:
            message, reason = await ask(router, **fields)
            assert (message["content"], reason) == (text, "stop")
            assert "tool_calls" not in message


async def test_the_chunks_of_a_call(tmp_path: Path) -> None:
    async with saying(tmp_path, f"<tool_call>{CALL}</tool_call>") as router:
        body = {"messages": [], "tools": [WEATHER], "stream": True, "stream_options": {"include_usage": True}}
        response = await router.post("/v1/chat/completions", body)
    *lines, usage, done = response.text.split("\n\n")[:-1]
    assert done == "data: [DONE]"
    assert json.loads(usage.removeprefix("data: "))["choices"] == []
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
    calls = [choice["delta"]["tool_calls"] for choice in choices[:-1]]
    call_id = calls[0][0]["id"]

    def chunk(call_id: str, name: str | None, arguments: str) -> list[dict[str, Any]]:
        function = {"name": name, "arguments": arguments}
        return [{"index": 0, "id": call_id, "type": "function", "function": function}]

    assert calls == [
        chunk(call_id, "get_weather", "{"),
        *(chunk("", None, character) for character in ARGUMENTS[1:]),
    ]
    assert choices[-1]["delta"] == {"role": "assistant", "content": ""}
    assert [choice["finish_reason"] for choice in choices] == [None] * len(calls) + ["tool_calls"]


async def test_a_call_that_is_cut_off(tmp_path: Path) -> None:
    async with saying(tmp_path, f"<tool_call>{CALL}</tool_call>") as router:
        message, reason = await ask(
            router, tools=[WEATHER], max_tokens=len('<tool_call>{"name": "get_weather", "arguments": {"ci')
        )
        assert reason == "length"
        assert message["content"] is None
        assert message["tool_calls"][0]["function"]["arguments"] == '{"ci'
        message, reason = await ask(router, tools=[WEATHER], max_tokens=16)
        assert (message["content"], reason) == ('<tool_call>{"nam', "length")


def test_marks_that_are_special_tokens_reach_the_parser(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_tokenizers.save(tmp_path), num_workers=1)
    token_ids = [
        *tiny_tokenizers.ids("ab"),
        tiny_tokenizers.SPECIAL.index("<|end|>"),
        *tiny_tokenizers.ids("bc"),
    ]

    def shown(*special: str) -> list[str]:
        request = Request(
            "id", "x", tuple(tiny_tokenizers.ids("x")), Sampling(), max_new_tokens=9, stop=("bb", "bc"),
            trim_stop=True, shown_special=frozenset(special),
        )  # fmt: skip
        answer = Answer(
            request,
            tokenizer,
            (),
            Mailbox(),
            tells_tokens=False,
            started_ns=0,
            metrics=Metrics(),
            clock_ns=lambda: 0,
        )
        for token_id in token_ids:
            if answer.on_token(SampledToken(token_id, 0.0)) is not None:
                break
        return [token.shown for token in answer.tokens]

    # What a stop string could begin with is held back, and keeps its place before the mark.
    assert shown("<|end|>") == ["a", "", "b<|end|>", "", ""]
    assert shown() == ["a", "", "", ""]  # the mark is not there: "bb" stops
    tokenizer.close()


async def test_the_parser_can_be_named(tmp_path: Path) -> None:
    text = f"[TOOL_CALLS][{CALL}]"
    async with saying(tmp_path, text, tool_call_parser="mistral") as router:
        message, reason = await ask(router, tools=[WEATHER])
        assert (len(message["tool_calls"]), reason) == (1, "tool_calls")


@pytest.mark.parametrize(
    "template", [TEMPLATE, tiny_tokenizers.CHAT_TEMPLATE], ids=["knows tools", "does not"]
)
async def test_forced_calls_follow_their_schema(tmp_path: Path, template: str) -> None:
    shard = ScriptedShard(
        vocab_size=tiny_tokenizers.VOCAB_SIZE,
        num_blocks=2048,
        max_total_tokens=2048,
        eos_token_ids=(tiny_tokenizers.EOS_ID,),
    )
    named: dict[str, Any] = {"type": "function", "function": {"name": "get_weather"}}
    async with running(tmp_path, shard=shard, chat_template_text=template) as router:
        for choice in ("get_weather", named, "required"):
            fields = {"tools": [WEATHER, NOTHING], "tool_choice": choice, "parallel_tool_calls": False}
            message, reason = await ask(router, **fields)
            assert reason == "tool_calls"
            assert message["content"] is None
            (call,) = message["tool_calls"]
            if call["function"]["name"] == "get_weather":
                arguments = json.loads(call["function"]["arguments"])
                assert len(arguments["city"]) <= 8
                assert arguments["unit"] in ("C", "F")
            else:
                assert choice == "required"
        deep: dict[str, Any] = {}
        for _ in range(150):
            deep = {"properties": {"a": deep}}
        response = await router.post(
            "/v1/chat/completions",
            {"messages": [], "tools": [{"type": "function", "function": {"name": "f", "parameters": deep}}]},
        )
        assert response.status_code == 422
        assert response.json()["error"]["message"] == "Tool error: the parameters of f are nested too deeply"
        message, _ = await ask(router, tools=[NOTHING], tool_choice="f", max_tokens=4)
        assert len(message["content"]) <= 4  # cut before there is a call
        response = await router.post(
            "/v1/chat/completions", {"messages": [], "tools": [WEATHER], "tool_choice": "g"}
        )
        assert response.status_code == 422
        assert response.json()["error"]["message"] == "Tool error: Tool with name g not found"
        assert response.json()["error_type"] == "tool_error"


async def test_what_the_template_sees(tmp_path: Path) -> None:
    async with saying(tmp_path, "ok") as router:

        async def num_characters(messages: list[dict[str, Any]], **fields: Any) -> int:
            body = {"messages": messages, "max_tokens": 1, **fields}
            response = await router.post("/v1/chat/completions", body)
            assert response.status_code == 200, response.text
            return int(response.headers["x-compute-characters"])

        user = {"role": "user", "content": "hi"}
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"city":"Bonn"}'}}
        assert await num_characters([user], tools=[WEATHER]) == len("get_weather <tool_call>[user]hi")
        assert await num_characters([user], tools=[WEATHER], tool_prompt="TP") == len(
            "get_weather <tool_call>[user]hi\n---\nTP"
        )
        assert await num_characters(
            [{"role": "assistant", "content": "", "tool_calls": [call]}, user]
        ) == len("[assistant]Bonn[user]hi")


async def test_thoughts_are_set_apart(tmp_path: Path) -> None:
    text = f"<think>\nHm.\n</think>\n\nSo <tool_call>{CALL}"
    async with saying(tmp_path, text, reasoning_parser="qwen3") as router:
        message, reason = await ask(router, tools=[WEATHER])
        assert (message["reasoning_content"], message["content"], reason) == ("Hm.", "So", "tool_calls")
    async with saying(
        tmp_path, "Hm.</think>So", reasoning_parser="auto", chat_template_text="{# </think> #}A:<think>\n"
    ) as router:
        message, reason = await ask(router)
        assert (message["reasoning_content"], message["content"], reason) == ("Hm.", "So", "stop")
        message, reason = await ask(router, max_tokens=2)
        assert (message["reasoning_content"], message["content"], reason) == ("Hm", "", "length")
    async with saying(tmp_path, text) as router:
        message, _ = await ask(router)
        assert message["content"] == text


def test_the_prompt_of_templates_that_know_no_tools() -> None:
    tool = Tool("f", None, {"type": "object"})
    told = '\n---\n[{"type":"function","function":{"name":"f","parameters":{"type":"object"}}}]\n'
    messages = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "x"}]

    def content(prompt: str | None, *, is_forced: bool) -> str:
        offer = Offer((tool,), is_forced=is_forced, is_parallel=True)
        return str(offer.with_prompt(messages, prompt, template_reads_tools=False)[0]["content"])

    assert content(None, is_forced=True) == "é" + told + FORCED_PROMPT
    assert content("", is_forced=False) == "é" + told + AUTO_PROMPT
    assert content("mine", is_forced=False) == "é" + told + "mine"
    assert messages[0]["content"] == "é"


def test_references_of_a_tool_s_schema_still_lead_into_it() -> None:
    parameters = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "properties": {"a": {"$ref": "#/$defs/A"}, "$ref": {"type": "string"}, "const": {"$ref": "#"}},
        "$defs": {"A": {"const": {"$ref": "#/$defs/A"}}},
    }
    schema = Offer((Tool("f", None, {}), Tool("g", None, parameters)), True, False).schema("hermes")
    assert schema["$defs"] == {
        "0": {"type": "object"},
        "1": {
            "type": "object",
            "properties": {
                "a": {"$ref": "#/$defs/1/$defs/A"},
                "$ref": {"type": "string"},
                "const": {"$ref": "#/$defs/1"},
            },
            "$defs": {"A": {"const": {"$ref": "#/$defs/A"}}},
        },
    }
