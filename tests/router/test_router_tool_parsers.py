"""Parsers of tool calls: what they read, that pieces do not matter, and that nothing breaks them."""

import json
import random
from collections.abc import Callable, Iterable

import pytest

from tgi_router.text.message import CallArguments, CallName, Content, Delta, Message, Parser
from tgi_router.text.tool_parsers import json_calls, registry
from tgi_router.text.tool_parsers.json_calls import JSONCallParser
from tgi_router.text.tool_parsers.json_text import JSONText
from tgi_router.text.tool_parsers.pythonic import json_of
from tgi_router.text.tool_parsers.registry import parser_of

NAMES = ("f", "get_weather", "no-args")

ARGUMENTS = (
    "{}",
    '{"a": 1, "b": [true, null, -1.5e3]}',
    '{ "city" : "東京 🗼 née", "deep": {"x": [{"y": "</tool_call> [TOOL_CALLS] }{"}]} }',
    '{"quote": "\\"\\\\ \\u00e9 \\ud83d\\ude00", "t": "a, b; c"}',
)

Make = Callable[[], Parser]

PARSERS: dict[str, Make] = {
    "hermes": lambda: parser_of("hermes", NAMES),
    "llama3_json": lambda: parser_of("llama3_json", NAMES),
    "mistral": lambda: parser_of("mistral", NAMES),
    "pythonic": lambda: parser_of("pythonic", NAMES),
    "any": lambda: parser_of(None, NAMES),
    "forced": lambda: JSONCallParser(json_calls.FORCED, NAMES),
}


def deltas_of(parser: Parser, pieces: Iterable[str]) -> list[Delta]:
    return [delta for piece in pieces for delta in parser.push(piece)] + parser.finish()


def fold(deltas: Iterable[Delta]) -> Message:
    message = Message()
    for delta in deltas:
        message.add(delta)
    return message


def read(name: str, text: str) -> tuple[str, list[tuple[str, str]]]:
    message = fold(deltas_of(PARSERS[name](), [text]))
    return message.content, [(call.name, call.arguments) for call in message.calls]


def chunks(text: str, rng: random.Random) -> list[str]:
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(len(text) + 1)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_each_format(arguments: str) -> None:
    call = f'{{"name": "f", "arguments": {arguments}}}'
    calls = [("f", arguments)]
    assert read("hermes", f"<tool_call>\n{call}\n</tool_call>") == ("", calls)
    assert read("hermes", f"Well.\n\n<tool_call>{call}</tool_call>\n<tool_call>\n{call}") == (
        "Well.",
        calls * 2,
    )
    assert read("hermes", f"<|tool_call|>[{call}, {call}]") == ("", calls * 2)
    assert read("hermes", call) == (call, [])
    turned = f'{{"arguments": {arguments}, "id": "x", "name": "f"}}'
    assert read("hermes", f"<tool_call>{turned}</tool_call> so") == ("so", calls)
    llama = f'{{"type": "function", "name": "f", "parameters": {arguments}}}'
    assert read("llama3_json", llama) == ("", calls)
    assert read("llama3_json", f"<|python_tag|>{llama}; {llama}") == ("", calls * 2)
    assert read("llama3_json", f"Here: {llama}") == (f"Here: {llama}", [])
    assert read("mistral", f"[TOOL_CALLS] [{call}, {call}]") == ("", calls * 2)
    assert read("mistral", f"[TOOL_CALLS]f{arguments}[TOOL_CALLS]f[ARGS]{arguments}") == ("", calls * 2)
    assert read("mistral", f"I look. [TOOL_CALLS]f[CALL_ID]a1b2[ARGS]{arguments}") == ("I look.", calls)
    assert read("mistral", f"[{call}]") == ("", calls)
    assert read("any", f" {llama}") == ("", calls)
    assert read("forced", f"[{call},{call}]") == ("", calls * 2)


def test_python_calls() -> None:
    text = "[get_weather(city='東京 🗼, (a)', n=[1, -2.5, (True, None)], o={\"k\": false}), no-args()]"
    calls = [
        ("get_weather", '{"city": "東京 🗼, (a)", "n": [1,-2.5,[true,null]], "o": {"k":false}}'),
        ("no-args", "{}"),
    ]
    assert read("pythonic", text) == ("", calls)
    assert read("pythonic", f"<|python_start|>{text}<|python_end|> done") == ("done", calls)
    assert read("pythonic", f"Sure: {text}") == (f"Sure: {text}", [])
    assert read("pythonic", "[f(a=1), f(b=open('x'))]") == ("b=open('x'))]", [("f", '{"a": 1}'), ("f", "")])
    assert read("pythonic", "[f(a=1, b='cut") == ("", [("f", '{"a": 1')])
    assert read("pythonic", "[1, 2]") == ("[1, 2]", [])
    assert read("pythonic", "[g(a=1)]") == ("[g(a=1)]", [])


@pytest.mark.parametrize(
    "expression",
    ["f()", "a", "1 + 1", "b'x'", "{1: 2}", "'\\ud800'", "9" * 5000, "(" * 500, "x" + ".y" * 9999, ""],
)
def test_only_literals_become_json(expression: str) -> None:
    with pytest.raises(ValueError, match=r"literal|strings"):
        json_of(expression)


def test_names_come_early_and_arguments_as_they_are_written() -> None:
    parser = PARSERS["hermes"]()
    seen = [
        parser.push(piece)
        for piece in (
            "So ",
            "<tool",
            "_call>",
            '{"name": "f",',
            ' "arguments": {',
            '"a',
            '": "b',
            'c"',
            "}}",
            "</tool_call>",
        )
    ]
    assert seen == [
        [Content("So")],
        [],
        [],
        [],
        [CallName(0, "f"), CallArguments(0, "{")],
        [CallArguments(0, '"a')],
        [CallArguments(0, '": "b')],
        [CallArguments(0, 'c"')],
        [CallArguments(0, "}")],
        [],
    ]


def test_slips_of_models() -> None:
    assert read("hermes", '<tool_call>{"name": "f"}</tool_call>') == ("", [("f", "{}")])
    assert read("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>') == ("", [("f", "{}")])
    assert read("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}') == (
        "",
        [("f", '{"a": 1}')],
    )
    assert read("hermes", '<tool_call>{"name": "f", "arguments": {}}}</tool_call>') == ("", [("f", "{}")])
    newline = read("hermes", '<tool_call>{"name": "f", "arguments": {"a": "1\n2"}}')
    assert newline == ("", [("f", '{"a": "1\\n2"}')])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "<tool_call>{'name': 'f'}</tool_call>"),
        ("hermes", '<tool_call>{"name": "g", "arguments": {}}</tool_call> x'),
        ("hermes", '<tool_call>{"name": ["f"], "arguments": {}}'),
        ("hermes", '<tool_call>{"name": "f", "arguments": 3}'),
        ("hermes", '<tool_call>{"name": "f", "arguments": "\\ud800"}'),
        ("hermes", "<tool_call>no JSON </tool_call>  "),
        ("hermes", '<tool_call>{"na'),
        ("hermes", "1 < 2 <tool"),
        ("llama3_json", '{"name": "Bob", "parameters": 3}'),
        ("llama3_json", '{"answer": 42}\n'),
        ("llama3_json", '<|python_tag|>brave_search.call(query="x")'),
        ("mistral", "[1] is a footnote"),
        ("mistral", "[TOOL_CALLS]g{}"),
        ("any", "{" * 2000),
        ("any", '{"type": ' + "[" * 2000),
    ],
)
def test_what_is_no_call_stays_content(name: str, text: str) -> None:
    assert read(name, text) == (text, [])


def test_a_call_that_breaks_keeps_what_was_told() -> None:
    assert read("hermes", '<tool_call>{"name": "f", "arguments": {"a": oops}}</tool_call>') == (
        "oops}}</tool_call>",
        [("f", '{"a": ')],
    )


FRAGMENTS = (
    *(
        "<tool_call>",
        "</tool_call>",
        "<tool",
        "_call>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "<|python_tag|>",
        "<|python_start|>",
    ),
    *(
        '{"name": "f", "arguments": ',
        '{"name": "f", "parameters": ',
        '"name": "f"',
        "{",
        "}",
        "[",
        "]",
        ",",
        ";",
        " ",
        "\n",
    ),
    *(
        "f(",
        "[f(",
        "a=",
        "'x'",
        '"',
        ")",
        "get_weather",
        "no-args",
        "words",
        "🗼",
        "日本",
        "\\",
        "1",
        "true",
        ":",
    ),
    *ARGUMENTS,
)


@pytest.mark.parametrize("name", PARSERS)
def test_pieces_do_not_matter(name: str) -> None:
    rng = random.Random(name)
    num_calls = 0
    for _ in range(400):
        text = "".join(rng.choices(FRAGMENTS, k=rng.randrange(1, 14)))
        if rng.random() < 0.5:
            key = rng.choice(("arguments", "parameters"))
            one = f'{{"name": "f", "{key}": {rng.choice(ARGUMENTS)}}}'
            text = rng.choice(("", "<tool_call>", "[TOOL_CALLS] [", "<|python_tag|>", "[")) + one + text
        whole = fold(deltas_of(PARSERS[name](), [text]))
        num_calls += len(whole.calls)
        assert fold(deltas_of(PARSERS[name](), text)) == whole, text  # one character at a time
        for _ in range(3):
            assert fold(deltas_of(PARSERS[name](), chunks(text, rng))) == whole, text
        if not whole.calls:
            assert whole.content == text  # nothing is lost
    assert num_calls > 5


@pytest.mark.parametrize("name", PARSERS)
def test_every_beginning_of_an_answer_is_an_answer(name: str) -> None:
    """Cut off anywhere: no error, and what was told of a call is never taken back."""
    text = {
        "pythonic": "[get_weather(city='東京', n=2), f()]",
        "mistral": 'Hm [TOOL_CALLS] [{"name": "f", "arguments": {"a": "🗼"}}, {"name": "no-args"}]',
        "hermes": 'Hm <tool_call>{"name": "f", "arguments": {"a": "🗼"}}</tool_call>',
    }.get(name, '{"name": "f", "parameters": {"a": "🗼", "b": [1, 2]}}')
    last = Message()
    for end in range(len(text) + 1):
        message = fold(deltas_of(PARSERS[name](), [text[:end]]))
        assert len(message.calls) >= len(last.calls)
        for before, now in zip(last.calls, message.calls, strict=False):
            assert now.arguments.startswith(before.arguments)
        last = message
    assert last.calls
    for call in last.calls:
        json.loads(call.arguments)


def test_json_text_agrees_with_a_json_library() -> None:
    rng = random.Random(5)
    parts = (
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        '"a"',
        '"\\n"',
        '"\\u00e9"',
        "1",
        "-0.5e+1",
        "01",
        "true",
        "nul",
        " ",
        '"',
        "-",
    )
    num_valid = 0
    for _ in range(20_000):
        text = "".join(rng.choices(parts, k=rng.randrange(1, 7)))
        value = JSONText()
        end, told = value.push(text + "\n", 0)
        try:
            json.loads(text)
            is_valid = True
        except ValueError:
            is_valid = False
        is_whole = value.is_complete and not (text + "\n")[end:].strip()
        assert is_whole == is_valid, text
        num_valid += is_valid
        assert not is_valid or told == text[:end]
    assert num_valid > 500


def test_the_template_shows_the_format() -> None:
    assert registry.detect("… return within <tool_call></tool_call> …") == "hermes"
    assert registry.detect("{{ '[TOOL_CALLS] [' }}") == "mistral"
    assert (
        registry.detect('<|python_tag|> … {"name": function name, "parameters": dictionary …')
        == "llama3_json"
    )
    assert registry.detect("[func_name1(params_name1=params_value1…)]") == "pythonic"
    assert registry.detect("{{ tools | tojson }}") is None
