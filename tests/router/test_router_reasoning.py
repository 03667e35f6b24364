"""Thoughts set apart from the answer, however the text is cut into pieces."""

import random

import pytest

from tgi_router.text import reasoning
from tgi_router.text.message import Message, PlainText
from tgi_router.text.reasoning import ReasoningParser, begins_in_thought
from tgi_router.text.tool_parsers.registry import parser_of


def read(pieces: list[str] | str, *, is_open: bool = False, with_tools: bool = False) -> Message:
    parser = ReasoningParser(parser_of("hermes", ("f",)) if with_tools else PlainText(), is_open=is_open)
    message = Message()
    for delta in [delta for piece in pieces for delta in parser.push(piece)] + parser.finish():
        message.add(delta)
    return message


@pytest.mark.parametrize(
    ("text", "is_open", "thought", "content"),
    [
        ("<think>\nHm, 東京 🗼\n</think>\n\nJa.", False, "Hm, 東京 🗼", "Ja."),
        ("<think></think>Ja.", False, "", "Ja."),
        ("\n Hm\n</think> Ja. </think>", True, "Hm", "Ja. </think>"),
        ("<think>Hm</think>Ja", True, "Hm", "Ja"),  # opened twice
        ("Ja. <think>no", False, "", "Ja. <think>no"),
        ("  Ja ", False, "", "  Ja "),
        ("<think>Hm</thi", False, "Hm</thi", ""),
        ("<thi", False, "", "<thi"),
        ("", True, "", ""),
    ],
)
def test_where_the_thought_ends(text: str, is_open: bool, thought: str, content: str) -> None:
    for pieces in ([text], list(text)):
        message = read(pieces, is_open=is_open)
        assert (message.reasoning, message.content) == (thought, content)


def test_calls_within_thoughts_are_thoughts() -> None:
    call = '<tool_call>{"name": "f"}</tool_call>'
    message = read([f"<think>{call}</think>{call}"], with_tools=True)
    assert message.reasoning == call
    assert [item.name for item in message.calls] == ["f"]


def test_pieces_do_not_matter() -> None:
    rng = random.Random(3)
    fragments = (
        "<think>",
        "</think>",
        "<thi",
        "nk>",
        " ",
        "\n",
        "a",
        "🗼",
        '<tool_call>{"name": "f"}</tool_call>',
    )
    for _ in range(1000):
        text = "".join(rng.choices(fragments, k=rng.randrange(8)))
        is_open, with_tools = rng.random() < 0.5, rng.random() < 0.5
        whole = read([text], is_open=is_open, with_tools=with_tools)
        assert read(text, is_open=is_open, with_tools=with_tools) == whole, text
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(4))
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert read(pieces, is_open=is_open, with_tools=with_tools) == whole, text


def test_who_opens_the_thought() -> None:
    assert begins_in_thought("qwen3", "<|assistant|>\n<think>\n")
    assert not begins_in_thought("qwen3", "what is <think>?<|assistant|>")
    assert not begins_in_thought("qwen3", "<|assistant|><think>\n\n</think>\n\n")
    assert begins_in_thought("deepseek_r1", "<|assistant|>")
    assert not begins_in_thought("deepseek_r1", "<|assistant|></think>")
    assert reasoning.detect("… <think>\\n\\n</think> …") == "qwen3"
    assert reasoning.detect("{{ messages }}") is None
