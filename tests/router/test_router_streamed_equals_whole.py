"""What a stream brings, folded, is the answer in one piece: byte for byte, on every route that streams.

The model says random texts (letters of many scripts, marks of tool calls and thoughts, stop strings, now and
then bytes that are no text), split over tokens at random, each choice of a request its own.
"""

import json
import random
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

import split_tokenizers
from router_app import Running, listening, running
from scripted_shard import ScriptedSequence, ScriptedShard, extend_digest
from split_tokenizers import Kind, SplitTokenizer, split
from tgi_proto import generate_pb2 as pb

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MAX_TOKENS = 120

WORDS = (
    *(
        "Hello",
        " world",
        "…",
        " ",
        "\n\n",
        " a b",
        "東京",
        "日本語のテキスト",
        "🗼",
        "👩‍👩‍👧‍👦",
        "e\u0301",
        "é",
        "नमस्ते",
        "👍🏽",
    ),
    *("STOP", "ST", "OP", "京🗼", "end", "\u0301", "x" * 20),
)
CALLS = (
    '{"name": "f", "arguments": {"city": "東京 🗼 e\u0301", "n": [1, -2.5e3, null]}}',
    '{"name": "f", "parameters": {"q": "\\u00e9 \\"STOP\\" </tool_call>"}}',
    '{"arguments": {}, "name": "g"}',
    "f(city='東京 🗼', n=[1, (True, None)])",
    'f{"a": "🗼"}',
    '{"name": "unknown", "arguments": {}}',
    '{"name": "f", "argum',
)
MARKS = (
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "<|python_tag|>",
    "[",
    "]",
    ",",
    "; ",
    "<think>",
    "</think>",
)
# Marks that models have as one special token; others write them letter by letter.
SPECIAL = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<think>", "</think>", "<|end|>")
STOPS = ("STOP", "京🗼", "\n\n", "e\u0301", '"}', "<|end|>")
NOT_TEXT = (b"\xff", "🗼".encode()[:3], "京".encode()[:1], "é".encode()[1:])

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("f", "g")
]
FORCED_TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 6}, "unit": {"enum": ["°C", "🗼"]}},
            "required": ["city", "unit"],
        },
    },
}

# What a model of each format writes, and nothing is wrong with it.
WELL_WRITTEN = {
    "hermes": f"<tool_call>{CALLS[0]}</tool_call>",
    "mistral": f"[TOOL_CALLS][{CALLS[0]}]",
    "llama3_json": CALLS[1],
    "pythonic": f"[{CALLS[3]}]",
    "unknown": CALLS[1],
}
PARSERS: dict[str, dict[str, Any]] = {
    "hermes": {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"},
    "mistral": {"tool_call_parser": "mistral"},
    "llama3_json": {"tool_call_parser": "llama3_json"},
    "pythonic": {"tool_call_parser": "pythonic", "reasoning_parser": "deepseek_r1"},
    "unknown": {},
}


@dataclass
class Speaker(ScriptedShard):
    """Each choice says a script of its own, with logprobs that tell one token and place from another."""

    scripts: tuple[tuple[int, ...], ...] = ()
    script_of: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def _add(self, added: pb.AddSequence) -> None:
        super()._add(added)
        scripts = self.scripts or ((),)
        self.script_of[added.sequence_id] = scripts[added.sampling.choice % len(scripts)]

    def _run(
        self, sequence_id: int, sequence: ScriptedSequence, num_tokens: int, result: pb.StepResult
    ) -> None:
        self.script = self.script_of[sequence_id]
        num_results, num_top = len(result.token_ids), len(result.top_logprobs)
        super()._run(sequence_id, sequence, num_tokens, result)
        if len(result.token_ids) > num_results:
            best = -(extend_digest(len(sequence.token_ids), result.token_ids[-1]) % 100_000) / 9973
            result.logprobs[-1] = best
            for rank in range(len(result.top_logprobs) - num_top):
                result.top_logprobs[num_top + rank] = best - rank / 7


@dataclass(frozen=True)
class Case:
    """One text, as it is split over tokens, and a request's fields that have to do with it."""

    token_ids: tuple[int, ...]
    is_text: bool  # all of its bytes


@dataclass(frozen=True)
class Book:
    """The texts of one router, and the tokenizer that can split them so."""

    tokenizer: SplitTokenizer
    cases: tuple[Case, ...]


def write(kind: Kind, rng: random.Random, *, parser: str = "hermes", num_texts: int = 12) -> Book:
    texts = [list(_parts(rng, parser)) for _ in range(num_texts)]
    pieces = [[part if isinstance(part, str) else split(part, rng) for part in parts] for parts in texts]
    vocabulary = {piece for parts in pieces for part in parts if not isinstance(part, str) for piece in part}
    tokenizer = split_tokenizers.build(kind, vocabulary, SPECIAL)
    cases = []
    for parts in pieces:
        token_ids: list[int] = []
        data = b""
        for part in parts:
            token_ids += [tokenizer.special_id(part)] if isinstance(part, str) else tokenizer.ids(part)
            data += b"" if isinstance(part, str) else b"".join(part)
        cases.append(Case((*token_ids, tokenizer.eos_id), _is_text(parts)))
    return Book(tokenizer, tuple(cases))


def _parts(rng: random.Random, parser: str) -> Iterable[str | bytes]:
    """What one answer is made of: special tokens (str), and bytes between them."""
    texts: list[str | bytes] = []
    if rng.random() < 0.4:
        texts += ["<think>", *rng.choices(WORDS, k=rng.randint(0, 3)), "</think>"]
    if rng.random() < 0.5:
        texts += _marked(WELL_WRITTEN[parser])
    kinds = rng.choice(((WORDS,), (WORDS, MARKS, CALLS)))
    texts += [rng.choice(rng.choice(kinds)) for _ in range(rng.randint(0, 6))]
    if rng.random() < 0.2:
        texts.insert(rng.randrange(len(texts) + 1), rng.choice(NOT_TEXT))
    held = b""
    for text in texts:
        if isinstance(text, str) and text in SPECIAL and rng.random() < 0.5:
            if held:
                yield held
            held = b""
            yield text
        else:
            held += text.encode() if isinstance(text, str) else text
    if held:
        yield held


def _marked(text: str) -> list[str]:
    """Cut where marks begin and end."""
    return [part for part in re.split(f"({'|'.join(map(re.escape, SPECIAL))})", text) if part]


def _is_text(parts: Iterable[str | list[bytes]]) -> bool:
    try:
        for part in parts:
            _ = part if isinstance(part, str) else b"".join(part).decode()
    except UnicodeDecodeError:
        return False
    return True


@asynccontextmanager
async def reading(book: Book, folder: Path, **changes: Any) -> AsyncIterator[tuple[Running, Speaker]]:
    shard = Speaker(
        vocab_size=book.tokenizer.vocab_size,
        num_blocks=4096,
        max_total_tokens=1024,
        eos_token_ids=(book.tokenizer.eos_id,),
    )
    changes |= {"shard": shard, "saved_tokenizer": book.tokenizer.tokenizer, "enable_prefill_logprobs": True}
    async with (
        running(folder, **changes) as router,
        listening(router) as port,  # a real connection: streams have a way past ASGI there
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as router.client,
    ):
        yield router, shard


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    blocks = response.content.decode().removesuffix("\n\n").split("\n\n")
    return [
        json.loads(block.removeprefix("data: ")) for block in blocks if block not in (":", "data: [DONE]")
    ]


def fold_chat(chunks: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Choices and usage, as OpenAI's clients join the chunks. Calls without their ids."""
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    for chunk in chunks:
        usage = chunk["usage"] or usage
        for piece in chunk["choices"]:
            new = {"content": "", "reasoning": "", "calls": [], "logprobs": [], "finish_reason": None}
            choice = choices.setdefault(piece["index"], new)
            assert choice["finish_reason"] is None  # nothing follows it
            choice["finish_reason"] = piece["finish_reason"]
            delta = piece["delta"]
            choice["content"] += delta.get("content") or ""
            choice["reasoning"] += delta.get("reasoning_content") or ""
            choice["logprobs"] += (piece["logprobs"] or {"content": []})["content"]
            for call in delta.get("tool_calls", ()):
                assert call["index"] in (len(choice["calls"]), len(choice["calls"]) - 1)
                if call["index"] == len(choice["calls"]):
                    assert call["id"]
                    choice["calls"].append(["", ""])
                choice["calls"][-1][0] += call["function"]["name"] or ""
                choice["calls"][-1][1] += call["function"]["arguments"]
    return [choices[index] for index in sorted(choices)], usage


def choices_of_chat(reply: dict[str, Any]) -> list[dict[str, Any]]:
    """The same of a reply in one piece."""
    choices = []
    for choice in reply["choices"]:
        message = choice["message"]
        calls = message.get("tool_calls", [])
        assert (message["content"] is None) <= bool(calls)
        choices.append(
            {
                "content": message["content"] or "",
                "reasoning": message.get("reasoning_content", ""),
                "calls": [[call["function"]["name"], call["function"]["arguments"]] for call in calls],
                "logprobs": (choice["logprobs"] or {"content": []})["content"],
                "finish_reason": choice["finish_reason"],
            }
        )
    return choices


def fold_completion(chunks: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    for chunk in chunks:
        usage = chunk["usage"] or usage
        for piece in chunk["choices"]:
            choice = choices.get(piece["index"])
            if choice is None:
                choices[piece["index"]] = piece
                continue
            assert choice["finish_reason"] is None
            choice["finish_reason"] = piece["finish_reason"]
            choice["text"] += piece["text"]
            for key, values in (piece["logprobs"] or {}).items():
                choice["logprobs"][key] += values
    return [choices[index] for index in sorted(choices)], usage


async def both(router: Running, path: str, body: dict[str, Any], streamed: dict[str, Any]) -> tuple[Any, Any]:
    """The reply in one piece and the events of the stream."""
    whole = await router.post(path, body)
    assert whole.status_code == 200, whole.text
    return whole.json(), events_of(await router.post(path, body | streamed))


def some_stops(rng: random.Random) -> list[str]:
    return rng.sample(STOPS, k=rng.choice((0, 0, 3)))


@pytest.mark.parametrize("kind", split_tokenizers.KINDS)
async def test_generate(kind: Kind, tmp_path: Path) -> None:
    rng = random.Random(f"generate {kind}")
    book = write(kind, rng, num_texts=40)
    num_stopped = 0
    async with reading(book, tmp_path) as (router, shard):
        for case in book.cases:
            shard.scripts = (case.token_ids,)
            parameters = {
                "max_new_tokens": rng.choice((MAX_TOKENS, rng.randint(1, 20))),
                "details": True,
                "do_sample": rng.random() < 0.5,
                "seed": rng.randrange(2**64),
                "stop": some_stops(rng),
                "top_n_tokens": rng.choice((None, 3)),
                "return_full_text": rng.random() < 0.3,
            }
            body = {"inputs": rng.choice(("ab", "東京 🗼", "e\u0301")), "parameters": parameters}
            response = await router.post("/generate", body)
            assert response.status_code == 200, response.text
            whole = response.json()
            events = events_of(await router.post("/generate_stream", body))
            details = whole["details"]
            assert [event["token"] for event in events] == details["tokens"]
            assert [event["index"] for event in events] == list(range(1, len(events) + 1))
            assert [event.get("top_tokens") for event in events] == details.get(
                "top_tokens", [None] * len(events)
            )
            assert [event["generated_text"] for event in events[:-1]] == [None] * (len(events) - 1)
            assert events[-1]["generated_text"] == whole["generated_text"]
            assert events[-1]["details"] == {
                "finish_reason": details["finish_reason"],
                "generated_tokens": details["generated_tokens"],
                "seed": details["seed"],
                "input_length": int(response.headers["x-prompt-tokens"]),
            }
            assert [event["details"] for event in events[:-1]] == [None] * (len(events) - 1)
            compatible = await both(router, "/", body, {"stream": True})
            assert compatible == ([whole], events) or parameters["return_full_text"] is False
            num_stopped += details["finish_reason"] == "stop_sequence"
            if case.is_text:
                prefix = body["inputs"] if parameters["return_full_text"] else ""
                shown = [token["text"] for token in details["tokens"] if not token["special"]]
                assert whole["generated_text"] == prefix + "".join(shown)
    assert num_stopped


@pytest.mark.parametrize("kind", split_tokenizers.KINDS)
async def test_completions(kind: Kind, tmp_path: Path) -> None:
    rng = random.Random(f"completions {kind}")
    book = write(kind, rng)
    reasons = set()
    async with reading(book, tmp_path) as (router, shard):
        for case in book.cases:
            shard.scripts = (case.token_ids, *(other.token_ids for other in rng.choices(book.cases, k=2)))
            body: dict[str, Any] = {
                "prompt": rng.choice(("ab", ["東京 🗼", "e\u0301"], list("🗼".encode()[:2]))),
                "max_tokens": rng.choice((MAX_TOKENS, rng.randint(1, 20))),
                "n": rng.choice((1, 1, 2, 3)),
                "seed": 7,
                "stop": some_stops(rng) or None,
                "logprobs": rng.choice((None, 0, 3)),
                "echo": rng.random() < 0.3,
                "ignore_eos": rng.random() < 0.2,
            }
            whole, chunks = await both(
                router, COMPLETIONS, body, {"stream": True, "stream_options": {"include_usage": True}}
            )
            assert fold_completion(chunks) == (whole["choices"], whole["usage"])
            reasons |= {choice["finish_reason"] for choice in whole["choices"]}
            # TGI's way: each choice's usage on its last chunk.
            tgi_chunks = events_of(await router.post(COMPLETIONS, body | {"stream": True}))
            assert (
                fold_completion([chunk | {"usage": None} for chunk in map(dict, tgi_chunks)])[0]
                == whole["choices"]
            )
            usages = [chunk["usage"] for chunk in tgi_chunks if chunk.get("usage")]
            assert sum(usage["completion_tokens"] for usage in usages) == whole["usage"]["completion_tokens"]
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("kind", split_tokenizers.KINDS)
@pytest.mark.parametrize("parser", PARSERS)
async def test_chat(parser: str, kind: Kind, tmp_path: Path) -> None:
    rng = random.Random(f"chat {parser} {kind}")
    book = write(kind, rng, parser=parser)
    num_calls = num_thoughts = 0
    async with reading(book, tmp_path, **PARSERS[parser]) as (router, shard):
        for case in book.cases:
            shard.scripts = (case.token_ids, *(other.token_ids for other in rng.choices(book.cases, k=2)))
            logprobs = rng.random() < 0.6
            body = {
                "messages": [{"role": "user", "content": rng.choice(("hi", "東京 🗼"))}],
                "max_tokens": rng.choice((MAX_TOKENS, MAX_TOKENS, rng.randint(1, 30))),
                "n": rng.choice((1, 1, 2, 3)),
                "seed": 7,
                "stop": some_stops(rng),
                "logprobs": logprobs,
                "top_logprobs": rng.choice((None, 3)) if logprobs else None,
                "tools": rng.choice((None, TOOLS, TOOLS, TOOLS)),
                "parallel_tool_calls": rng.choice((None, None, False)),
            }
            whole, chunks = await both(
                router, CHAT, body, {"stream": True, "stream_options": {"include_usage": True}}
            )
            folded, usage = fold_chat(chunks)
            assert folded == choices_of_chat(whole)
            assert usage == whole["usage"]
            if logprobs:
                num_logprobs = sum(len(choice["logprobs"]) for choice in folded)
                assert num_logprobs == whole["usage"]["completion_tokens"]
            num_calls += sum(len(choice["calls"]) for choice in folded)
            num_thoughts += sum(bool(choice["reasoning"]) for choice in folded)
    assert num_calls
    assert bool(num_thoughts) is ("reasoning_parser" in PARSERS[parser])


@pytest.mark.parametrize("kind", split_tokenizers.KINDS)
@pytest.mark.parametrize("parser", ["hermes", "unknown"])
async def test_forced_calls(parser: str, kind: Kind, tmp_path: Path) -> None:
    rng = random.Random(f"forced {parser} {kind}")
    book = write(kind, rng)
    async with reading(book, tmp_path, **PARSERS[parser]) as (router, _):
        for number in range(6):
            body = {
                "messages": [{"role": "user", "content": f"{number}"}],
                "max_tokens": rng.choice((200, rng.randint(1, 60))),
                "n": 2,
                "seed": 7,
                "logprobs": True,
                "tools": [FORCED_TOOL],
                "tool_choice": rng.choice(("required", "f")),
                "parallel_tool_calls": rng.choice((None, False)),
            }
            whole, chunks = await both(
                router, CHAT, body, {"stream": True, "stream_options": {"include_usage": True}}
            )
            assert fold_chat(chunks) == (choices_of_chat(whole), whole["usage"])
