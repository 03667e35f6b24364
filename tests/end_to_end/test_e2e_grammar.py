"""Structured output from a random model at a high temperature: what it writes is what was asked for."""

import itertools
import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import tiny_models
from conftest import Launch
from server import Server, kill

MAX_NEW_TOKENS = 240
PROMPT = "Answer: "

NODE = {
    "type": "object",
    "properties": {
        "value": {"type": "integer", "minimum": -9, "maximum": 9},
        "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1},
    },
    "required": ["value", "children"],
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "nested": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "inner": {
                "type": "object",
                "properties": {"flag": {"type": "boolean"}, "none": {"type": "null"}},
                "required": ["flag", "none"],
            },
        },
        "required": ["name", "inner"],
    },
    "enums": {
        "type": "object",
        "properties": {"a": {"enum": ["red", "é", 3, None, {"b": [1]}]}, "c": {"const": [1, "x"]}},
        "required": ["a", "c"],
    },
    "arrays": {
        "type": "object",
        "properties": {
            "few": {
                "type": "array",
                "items": {"type": "integer", "minimum": 0, "maximum": 9},
                "minItems": 2,
                "maxItems": 4,
            },
            "tuple": {
                "type": "array",
                "prefixItems": [{"type": "boolean"}, {"enum": ["a"]}],
                "items": False,
                "minItems": 2,
            },
        },
        "required": ["few", "tuple"],
    },
    "recursive": {"$defs": {"node": NODE}, "$ref": "#/$defs/node"},
    "bounds": {
        "type": "object",
        "properties": {
            "i": {"type": "integer", "exclusiveMinimum": 17, "maximum": 4711},
            "n": {"type": "number", "minimum": -1.5, "exclusiveMaximum": 2.25},
            "s": {"type": "string", "minLength": 3, "maxLength": 5},
        },
        "required": ["i", "n", "s"],
    },
    "pattern and formats": {
        "type": "object",
        "properties": {
            "p": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
            "t": {"type": "string", "format": "date-time"},
            "u": {"type": "string", "format": "uuid"},
        },
        "required": ["p", "t", "u"],
    },
    "any of": {
        "type": "object",
        "properties": {"x": {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/pair"}, {"type": "null"}]}},
        "required": ["x"],
        "$defs": {
            "pair": {
                "type": "object",
                "properties": {"k": {"enum": ["l", "r"]}, "v": {"type": "boolean"}},
                "required": ["k", "v"],
                "additionalProperties": False,
            }
        },
    },
}
REGEXES = (
    r"[A-Z][a-z]{2,5}( [a-z]{1,3}){2}\.",
    r"(\d{1,3}\.){3}\d{1,3}",
    "(ja|nein|vielleicht)",
    "[äöü€😀]{3}",
)


@pytest.fixture(scope="module")
def server(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A random model that can end: the grammar decides when."""
    model = tiny_models.save("llama", tmp_path_factory.mktemp("tiny-llama-eos"), seed=3)
    with launch(model=str(model)) as started:
        yield started


def hot(seed: int, **fields: Any) -> dict[str, Any]:
    return {"temperature": 1.5, "do_sample": True, "seed": seed, "max_new_tokens": MAX_NEW_TOKENS, **fields}


def check(text: str, finish_reason: str, schema: dict[str, Any]) -> bool:
    """Whether it ended by itself; then it must be valid."""
    if finish_reason == "length":
        return False
    checker = Draft202012Validator.FORMAT_CHECKER
    Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))
    return True


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_answer_parses_and_validates(server: Server, name: str) -> None:
    schema = SCHEMAS[name]
    num_ended = 0
    native = {"type": "json", "value": schema}
    if "properties" not in schema:  # TGI's rule; OpenAI's form has none
        native = {}
    for seed in range(3):
        if native:
            reply = server.generate(PROMPT, **hot(seed, grammar=native, top_n_tokens=3))
            num_ended += check(reply["generated_text"], reply["details"]["finish_reason"], schema)
            logprobs = [top["logprob"] for tops in reply["details"]["top_tokens"] for top in tops]
            assert None not in logprobs  # -inf
            assert all(token["logprob"] <= 0 for token in reply["details"]["tokens"])
            streamed = list(server.stream(PROMPT, **hot(seed, grammar=native)))
            assert streamed[-1]["generated_text"] == reply["generated_text"]
        body = {
            "messages": [{"role": "user", "content": "go"}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
            "max_tokens": MAX_NEW_TOKENS,
            "temperature": 1.5,
            "seed": seed,
        }
        chat = server.client.post("/v1/chat/completions", json=body)
        assert chat.status_code == 200, chat.text
        choice = chat.json()["choices"][0]
        num_ended += check(choice["message"]["content"], choice["finish_reason"], schema)
    assert num_ended > 0


@pytest.mark.parametrize("regex", REGEXES)
def test_a_regex_is_matched(server: Server, regex: str) -> None:
    for seed in range(3):
        reply = server.generate(PROMPT, **hot(seed, grammar={"type": "regex", "value": regex}))
        assert reply["details"]["finish_reason"] == "eos_token"
        assert re.fullmatch(regex, reply["generated_text"])
    parameters = hot(0, best_of=2, grammar={"type": "regex", "value": regex})
    best = server.generate(PROMPT, **(parameters | {"seed": None}))
    (other,) = best["details"]["best_of_sequences"]
    assert re.fullmatch(regex, best["generated_text"])
    assert re.fullmatch(regex, other["generated_text"])


def test_a_lark_grammar_is_matched(server: Server) -> None:
    lark = 'start: "(" start ")" | "x"'
    reply = server.generate(PROMPT, **hot(1, grammar={"type": "lark", "value": lark}, max_new_tokens=400))
    text = reply["generated_text"]
    if reply["details"]["finish_reason"] == "eos_token":
        assert text == "(" * (len(text) // 2) + "x" + ")" * (len(text) // 2)
    else:
        assert set(text) <= set("(x)")


def test_monsters_are_refused_while_a_neighbours_stream_flows(server: Server) -> None:
    patterns = [{"type": "string", "pattern": f".*[a-m]{{{i}}}.*x"} for i in range(1, 30)]
    nested: dict[str, Any] = {"type": "string"}
    for _ in range(60):
        nested = {"type": "object", "properties": {"a": nested}}
    doubling = {f"d{i}": {"properties": {n: {"$ref": f"#/$defs/d{i + 1}"} for n in "ab"}} for i in range(40)}
    monsters: list[dict[str, Any]] = [
        {"type": "json", "value": {"properties": {"a": {"allOf": patterns}}, "required": ["a"]}},
        {"type": "json", "value": nested},
        {"type": "json", "value": {"properties": {"a": {"$ref": "#/$defs/d0"}}, "$defs": doubling}},
        {"type": "regex", "value": "((a{1,999}){1,999}b){1,999}"},
        {"type": "regex", "value": "(" * 3000 + "a" + ")" * 3000},
        {"type": "json", "value": '{"properties":' * 20000},
    ]
    arrivals: list[float] = []
    quiet = list(server.stream(PROMPT, max_new_tokens=300, do_sample=True, seed=5))
    loud: list[dict[str, Any]] = []

    def neighbour() -> None:
        for event in server.stream(PROMPT, max_new_tokens=300, do_sample=True, seed=5):
            arrivals.append(time.monotonic())
            loud.append(event)

    thread = threading.Thread(target=neighbour)
    thread.start()
    for grammar in monsters:
        began_at = time.monotonic()
        response = server.client.post(
            "/generate", json={"inputs": PROMPT, "parameters": {"grammar": grammar, "max_new_tokens": 5}}
        )
        assert response.status_code == 422, (grammar, response.text[:300])
        assert "grammar" in response.json()["error"]
        assert time.monotonic() - began_at < 2
    thread.join(60)
    assert [event["token"]["id"] for event in loud] == [event["token"]["id"] for event in quiet]
    gaps = sorted(later - earlier for earlier, later in itertools.pairwise(arrivals))
    assert gaps[-1] < 1.0  # a stall would last as long as a compilation


def test_a_grammar_survives_a_dead_shard(launch: Launch) -> None:
    """The model has no end of its own: the grammar ends the answer."""
    schema = {
        "type": "object",
        "properties": {"s": {"type": "string", "minLength": 150, "maxLength": 160}, "b": {"type": "boolean"}},
        "required": ["s", "b"],
    }
    parameters = hot(11, grammar={"type": "json", "value": schema}, max_new_tokens=400)
    with launch() as server:
        undisturbed = server.generate(PROMPT, **parameters)
        assert check(undisturbed["generated_text"], undisturbed["details"]["finish_reason"], schema)
        stream = server.stream(PROMPT, **parameters)
        events = [next(stream) for _ in range(8)]
        kill(server.shard_pids[-1])
        events.extend(stream)
        assert events[-1]["generated_text"] == undisturbed["generated_text"]
        assert events[-1]["details"]["finish_reason"] == "eos_token"
        assert [event["token"]["id"] for event in events] == [
            token["id"] for token in undisturbed["details"]["tokens"]
        ]
        assert server.metric("tgi_recoveries") == 1
