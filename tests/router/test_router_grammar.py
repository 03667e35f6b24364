"""Grammars in the router: what is refused, masks in the step loop before scripted shards, the routes."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_router_step_loop import Ear, running_loop, until

import tiny_tokenizers
from router_app import Running, running
from scripted_shard import ScriptedShard, next_token
from tgi_router.errors import Overloaded
from tgi_router.grammar.compile import MAX_COMPILE_S, GrammarCompiler
from tgi_router.grammar.mask import Grammar, MaskWorker
from tgi_router.grammar.sentry import MODULE, NICENESS, NUM_PROCESSES
from tgi_router.grammar.source import AskedGrammar, GrammarError, source_of
from tgi_router.request import Request, Sampling
from tgi_router.text.tokenizer import Tokenizer

EOS = tiny_tokenizers.EOS_ID
VOCAB_SIZE = tiny_tokenizers.VOCAB_SIZE
LETTERS = AskedGrammar("regex", "[a-z]{3}( [a-z]{3}){4}")


@pytest.fixture
async def compiler(tmp_path: Path) -> AsyncIterator[GrammarCompiler]:
    made = make_compiler(tmp_path, (EOS,))
    yield made
    await made.close()


def make_compiler(folder: Path, eos_token_ids: tuple[int, ...]) -> GrammarCompiler:
    tokenizer = Tokenizer.load(tiny_tokenizers.save(folder), num_workers=1)
    compiler = GrammarCompiler(tokenizer.to_json(), VOCAB_SIZE, eos_token_ids)
    tokenizer.close()
    return compiler


def schema(**properties: Any) -> AskedGrammar:
    return AskedGrammar("json", {"type": "object", "properties": properties, "required": list(properties)})


def closed(value: dict[str, Any]) -> Any:
    return json.loads(source_of(AskedGrammar("json", value)).text)


# What is asked for


def test_an_object_has_the_properties_that_are_named() -> None:
    inner = {"type": "object", "properties": {"b": {}}}
    outer = closed({"properties": {"a": inner}, "required": ["a"]})
    assert outer["additionalProperties"] is False
    assert outer["type"] == "object"
    assert outer["properties"]["a"]["additionalProperties"] is False
    for open_one in (
        {"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "string"}},
        {"type": "object", "properties": {"a": {}}, "patternProperties": {"^x": {}}},
        {"type": "object", "properties": {"a": {}}, "required": ["b"]},
        {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
        {"properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}}, {"properties": {"c": {}}}]},
        {"type": "object"},
    ):
        assert closed(open_one) == open_one
    # One `allOf` around a reference, as pydantic wrote it, says nothing together with others.
    referred = closed({"properties": {"a": {"allOf": [{"$ref": "#/$defs/d"}]}}, "$defs": {"d": inner}})
    assert referred["$defs"]["d"]["additionalProperties"] is False


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        inner = {"type": "object", "properties": {"a": inner}}
    return inner


def doubling(count: int) -> dict[str, Any]:
    both = {
        f"d{i}": {"properties": {name: {"$ref": f"#/$defs/d{i + 1}"} for name in "ab"}} for i in range(count)
    }
    return {"$defs": both | {f"d{count}": {"type": "string"}}, "properties": {"a": {"$ref": "#/$defs/d0"}}}


def patterns(count: int) -> dict[str, Any]:
    """Keeps llguidance busy for hours."""
    alike = [{"type": "string", "pattern": f".*[a-m]{{{i}}}.*x"} for i in range(1, count)]
    return {"type": "object", "properties": {"a": {"allOf": alike}}, "required": ["a"]}


REFUSED = {
    "not JSON": (AskedGrammar("json", "{not json"), "grammar is not valid: Expecting property name"),
    "an array": (AskedGrammar("json", [1]), "grammar is not supported"),
    "a number": (AskedGrammar("json", 7), "grammar is not supported"),
    "TGI's rule": (
        AskedGrammar("json", {"type": "object"}, needs_properties=True),
        "grammar is not valid: Grammar must have a 'properties' field",
    ),
    "unknown type": (schema(a={"type": "strng"}), "grammar is not valid: Invalid type"),
    "not enforceable": (schema(a={"uniqueItems": True}), "uniqueItems"),
    "unknown reference": (schema(a={"$ref": "#/$defs/x"}), "does not exist"),
    "contradiction": (schema(a={"type": "integer", "minimum": 5, "maximum": 4}), "nsatisfiable"),
    "refers to itself": (AskedGrammar("json", {"$ref": "#"}), "no text matches it"),
    "bad regex": (AskedGrammar("regex", "a("), "grammar is not valid: "),
    "look-ahead": (AskedGrammar("regex", "a(?=b)"), "grammar is not valid: "),
    "bad pattern": (schema(a={"type": "string", "pattern": "["}), "grammar is not valid: "),
    "bad Lark": (AskedGrammar("lark", "start: foo"), "unknown name"),
    "deep": (AskedGrammar("json", nested(1000)), "nested more than"),
    "deep text": (AskedGrammar("json", '{"a":' * 5000 + "1" + "}" * 5000), "grammar is not valid: "),
    "long": (schema(**{f"p{i}": {"type": "string"} for i in range(9000)}), "characters, more than"),
    "doubling": (AskedGrammar("json", doubling(40)), "its references stand for more than"),
    "counted": (AskedGrammar("regex", "a{1000000000}"), "repetitions written out"),
    "counted twice": (AskedGrammar("regex", "([a-z]{1,1000}x){1,1000}"), "repetitions written out"),
    "counted in a schema": (
        schema(a={"type": "string", "pattern": "((a{99}){99}){99}"}),
        "repetitions written out",
    ),
    "deep regex": (AskedGrammar("regex", "(" * 4000 + "a" + ")" * 4000), "grammar is not valid: "),
    "long regex": (AskedGrammar("regex", "a" * 20_000), "characters, more than"),
    "patterns that meet": (AskedGrammar("json", patterns(30)), "does not compile within"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_bad_grammars_are_refused_in_time(compiler: GrammarCompiler, name: str) -> None:
    asked, message = REFUSED[name]
    await compiler.ready()
    began_at = time.monotonic()
    with pytest.raises(GrammarError, match=None) as refused:
        await compiler.compile(asked)
    assert message in str(refused.value)
    assert time.monotonic() - began_at < MAX_COMPILE_S + 0.5


async def test_a_grammar_is_remembered_and_a_monster_leaves_nothing_behind(compiler: GrammarCompiler) -> None:
    first = await compiler.compile(LETTERS)
    assert await compiler.compile(AskedGrammar("regex", str(LETTERS.value))) is first
    monsters = [compiler.compile(AskedGrammar("json", patterns(30 + i))) for i in range(2)]
    outcomes = await asyncio.gather(*monsters, return_exceptions=True)
    assert all(isinstance(outcome, GrammarError) for outcome in outcomes)
    assert isinstance(await compiler.compile(schema(a={"type": "integer"})), Grammar)


async def test_waiting_behind_monsters_says_nothing_of_a_grammar(compiler: GrammarCompiler) -> None:
    monsters = [
        asyncio.create_task(compiler.compile(AskedGrammar("json", patterns(30 + i)))) for i in range(4)
    ]
    await asyncio.sleep(0.1)
    assert isinstance(await compiler.compile(LETTERS), Grammar)
    outcomes = await asyncio.gather(*monsters, return_exceptions=True)
    assert all(isinstance(outcome, GrammarError) for outcome in outcomes)


async def test_who_waits_for_too_long_is_told_to_come_again(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    await compiler.ready()
    monkeypatch.setattr("tgi_router.grammar.compile.MAX_WAIT_S", 0.3)
    monsters = [compiler.compile(AskedGrammar("json", patterns(30 + i))) for i in range(2)]
    outcomes = await asyncio.gather(*monsters, compiler.compile(LETTERS), return_exceptions=True)
    assert all(isinstance(outcome, Overloaded) for outcome in outcomes)
    monkeypatch.undo()
    assert isinstance(await compiler.compile(LETTERS), Grammar)


# The step loop


def expected_tokens(prompt: tuple[int, ...], grammar: Grammar, max_new_tokens: int) -> list[int]:
    """What a scripted shard generates under this grammar: one mask after the other."""
    matcher, token_ids = grammar.matcher(), list(prompt)
    for _ in range(max_new_tokens):
        written = memoryview(matcher.engine.compute_bitmask())
        token_ids.append(next_token(token_ids, VOCAB_SIZE, matcher.mask_of(written)))
        if matcher.advance(token_ids[-1]) or token_ids[-1] == EOS:
            break
    return token_ids[len(prompt) :]


class GrammarEar(Ear):
    """Ends where a grammar does."""

    def on_token(self, token: Any) -> Any:
        reason = super().on_token(token)
        if reason is None and token.ends_grammar:
            self.done.set()
            return "eos_token"
        return reason

    @property
    def token_ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]


def make_ear(prompt: tuple[int, ...], grammar: Grammar | None, max_new_tokens: int = 60) -> GrammarEar:
    return GrammarEar(Request("r", "", prompt, Sampling(), max_new_tokens, grammar=grammar), eos=EOS)


@pytest.mark.parametrize("world_size", [1, 2])
async def test_masks_follow_plans_that_ran_ahead(
    tmp_path: Path, compiler: GrammarCompiler, world_size: int
) -> None:
    grammars = [
        await compiler.compile(LETTERS),
        await compiler.compile(schema(name={"enum": ["one", "other"]}, size={"type": "integer"})),
        None,
    ]
    async with running_loop(tmp_path, world_size=world_size, vocab_size=VOCAB_SIZE) as (loop, services, _):
        ears = [make_ear((i + 3, 4, 5) * (i + 1), grammars[i % 3]) for i in range(15)]
        for ear in ears:
            loop.submit(ear.request, ear)
        await asyncio.wait_for(asyncio.gather(*(ear.done.wait() for ear in ears)), 20)
        for ear in ears:
            assert ear.error is None
            if ear.request.grammar is not None:
                expected = expected_tokens(ear.request.prompt_token_ids, ear.request.grammar, 60)
                assert ear.token_ids == expected
                assert ear.token_ids[-1] == EOS or len(ear.tokens) == 60
        assert services[0].shard.num_masks > 0
        await asyncio.wait_for(until(lambda: not services[0].shard.sequences), 5)


async def test_a_grammar_survives_preemptions_and_lost_shards(
    tmp_path: Path, compiler: GrammarCompiler
) -> None:
    grammar = await compiler.compile(AskedGrammar("regex", "([a-z]{3} ){12}"))
    async with running_loop(tmp_path, step_s=0.001, vocab_size=VOCAB_SIZE, num_blocks=24, block_size=4) as (
        loop,
        _,
        crash,
    ):
        ears = [make_ear((i + 3, 9, 9), grammar if i % 4 else None) for i in range(8)]
        for ear in ears:
            loop.submit(ear.request, ear)
        for num_tokens in (1, 5, 15):
            await asyncio.wait_for(until(lambda n=num_tokens: len(ears[1].tokens) >= n), 10)
            await crash()
        await asyncio.wait_for(asyncio.gather(*(ear.done.wait() for ear in ears)), 30)
        assert loop._scheduler.num_preemptions > 0
        for ear in ears:
            assert ear.error is None
            if ear.request.grammar is not None:
                assert ear.token_ids == expected_tokens(ear.request.prompt_token_ids, grammar, 60)


async def test_cancelling_a_sequence_whose_step_awaits_its_mask(
    tmp_path: Path, compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = MaskWorker._compute

    def slowly(self: MaskWorker, matchers: Any) -> Any:
        time.sleep(0.02)
        return compute(self, matchers)

    monkeypatch.setattr(MaskWorker, "_compute", slowly)
    grammar = await compiler.compile(LETTERS)
    async with running_loop(tmp_path, vocab_size=VOCAB_SIZE) as (loop, services, _):
        gone, other = make_ear((3, 4), grammar), make_ear((5, 6), grammar)
        sequence_id = loop.submit(gone.request, gone)
        loop.submit(other.request, other)
        await asyncio.wait_for(until(lambda: len(gone.tokens) >= 2), 5)
        await asyncio.sleep(0.01)  # a mask is being computed now
        loop.cancel(sequence_id)
        await asyncio.wait_for(other.done.wait(), 10)
        assert other.token_ids == expected_tokens((5, 6), grammar, 60)
        assert not gone.done.is_set()
        await asyncio.wait_for(until(lambda: not services[0].shard.sequences), 5)


async def test_without_an_end_token_the_grammar_ends_the_answer(tmp_path: Path) -> None:
    compiler = make_compiler(tmp_path / "tokenizer", ())
    grammar = await compiler.compile(LETTERS)
    async with running_loop(tmp_path, vocab_size=VOCAB_SIZE) as (loop, _, _):
        ear = make_ear((3, 4), grammar)
        loop.submit(ear.request, ear)
        await asyncio.wait_for(ear.done.wait(), 5)
        assert len(ear.tokens) < 60
        assert ear.tokens[-1].ends_grammar
        assert ear.token_ids == expected_tokens((3, 4), grammar, 60)
    await compiler.close()


def sentries() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if MODULE in child.cmdline()]


async def test_trying_a_grammar_gives_way_to_the_rest(compiler: GrammarCompiler) -> None:
    await compiler.compile(LETTERS)
    assert min(psutil.Process().nice() + NICENESS, 19) in {child.nice() for child in sentries()}


async def test_a_monster_ends_in_a_child_and_the_process_goes_on(compiler: GrammarCompiler) -> None:
    await compiler.ready()
    before = sentries()
    assert len(before) == NUM_PROCESSES
    for number in range(NUM_PROCESSES + 1):
        with pytest.raises(GrammarError, match="does not compile within"):
            await compiler.compile(AskedGrammar("json", patterns(30 + number)))
    assert sentries() == before  # no new one had to start
    assert isinstance(await compiler.compile(LETTERS), Grammar)
    until = time.monotonic() + MAX_COMPILE_S + 30  # the last one's time is up on its own clock
    while any(process.children() for process in before):
        assert time.monotonic() < until
        await asyncio.sleep(0.05)


async def test_a_process_that_died_is_replaced(compiler: GrammarCompiler) -> None:
    await compiler.ready()
    for process in sentries():
        process.kill()
        process.wait()
    with pytest.raises(GrammarError, match="it takes too much memory to compile"):
        await compiler.compile(AskedGrammar("regex", "a"))
    until = time.monotonic() + 60
    grammar = None
    while grammar is None:
        assert time.monotonic() < until
        with contextlib.suppress(GrammarError):  # on busy cores a process is not there in time
            grammar = await compiler.compile(AskedGrammar("regex", "a"))


# Over HTTP


@pytest.fixture
async def router(tmp_path: Path) -> AsyncIterator[Running]:
    shard = ScriptedShard(vocab_size=VOCAB_SIZE, num_blocks=256, eos_token_ids=(EOS,))
    async with running(tmp_path, shard=shard) as app:
        yield app


def generate(grammar: Any, **parameters: Any) -> dict[str, Any]:
    return {"inputs": "ab", "parameters": {"max_new_tokens": 60, "grammar": grammar, **parameters}}


async def test_native_forms(router: Running) -> None:
    wanted = {"properties": {"a": {"enum": ["x", "yz"]}}, "required": ["a"]}
    for grammar in (
        {"type": "json", "value": wanted},
        {"type": "json", "value": json.dumps(wanted)},
        {"type": "json_object", "value": wanted},
        {"type": "json_schema", "value": {"name": "n", "schema": wanted, "strict": True}},
    ):
        response = await router.post("/generate", generate(grammar, details=True))
        assert response.status_code == 200, response.text
        assert json.loads(response.json()["generated_text"])["a"] in ("x", "yz")
        assert response.json()["details"]["finish_reason"] == "eos_token"
    for grammar in (
        {"type": "regex", "value": r"(one|two){3}"},
        {"type": "lark", "value": 'start: word word word\nword: "one" | "two"'},
    ):
        response = await router.post("/generate", generate(grammar, stop=["never"]))
        assert set(response.json()["generated_text"].replace("one", "two").split("two")) == {""}


async def test_native_errors(router: Running) -> None:
    for grammar, message in (
        ({"type": "json", "value": "{"}, "grammar is not valid: "),
        ({"type": "json", "value": 3}, "grammar is not supported"),
        ({"type": "json", "value": {}}, "grammar is not valid: Grammar must have a 'properties' field"),
        ({"type": "regex", "value": "("}, "grammar is not valid: "),
    ):
        response = await router.post("/generate", generate(grammar))
        assert response.status_code == 422
        assert response.json()["error"].startswith(f"Input validation error: {message}")
        assert response.json()["error_type"] == "validation"
    for grammar in ({"type": "nonsense", "value": "a"}, {"type": "regex"}, {"value": "a"}):
        assert (await router.post("/generate", generate(grammar))).status_code == 422


async def test_openai_forms(router: Running) -> None:
    wanted = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 60}
    for response_format in (
        {"type": "json_schema", "json_schema": {"name": "n", "schema": wanted, "strict": True}},
        {"type": "json_schema", "value": {"schema": wanted}},
        {"type": "json", "value": wanted},
        {"type": "json_object", "value": wanted},
    ):
        response = await router.post("/v1/chat/completions", chat | {"response_format": response_format})
        (choice,) = response.json()["choices"]
        assert json.loads(choice["message"]["content"]) == {"a": 1}
        assert choice["finish_reason"] == "stop"
    body = {"prompt": "ab", "max_tokens": 60, "response_format": {"type": "regex", "value": "abc|xyz"}}
    response = await router.post("/v1/completions", body | {"n": 2, "temperature": 1.5})
    assert {choice["text"] for choice in response.json()["choices"]} <= {"abc", "xyz"}
    text = await router.post("/v1/chat/completions", chat | {"response_format": {"type": "text"}})
    assert text.status_code == 200
    any_object = await router.post(
        "/v1/chat/completions", chat | {"response_format": {"type": "json_object"}}
    )
    assert any_object.json()["choices"][0]["message"]["content"].startswith("{")
    neither = await router.post("/v1/chat/completions", chat | {"response_format": {"type": "json_schema"}})
    assert neither.status_code == 422


async def test_grammar_support_can_be_disabled(tmp_path: Path) -> None:
    async with running(tmp_path, grammars=False) as router:
        response = await router.post("/generate", generate({"type": "regex", "value": "a"}))
        assert response.json()["error"] == "Input validation error: grammar is not supported"


async def test_a_monster_does_not_hold_up_a_neighbours_stream(tmp_path: Path) -> None:
    shard = ScriptedShard(vocab_size=VOCAB_SIZE, num_blocks=256, max_total_tokens=2000)
    async with running(tmp_path, shard=shard, step_s=0.004) as router:
        grammars = router.app.grammars
        assert grammars is not None
        await grammars.ready()
        arrivals: list[float] = []

        async def neighbour() -> None:
            body = {"inputs": "ab", "parameters": {"max_new_tokens": 700}}
            async with router.client.stream("POST", "/generate_stream", json=body) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data:"):
                        arrivals.append(time.monotonic())

        async def monster(size: int) -> float:
            began_at = time.monotonic()
            response = await router.post("/generate", generate({"type": "json", "value": patterns(size)}))
            assert response.status_code == 422
            return time.monotonic() - began_at

        took = await asyncio.gather(neighbour(), *(monster(size) for size in (30, 31)))
        assert max(seconds for seconds in took if seconds is not None) < 2
