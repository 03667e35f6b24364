"""Which parser reads the calls of which model."""

from collections.abc import Collection
from typing import Literal

from tgi_router.text.message import Parser
from tgi_router.text.tool_parsers.json_calls import ANY, HERMES, LLAMA3, MISTRAL, JSONCallParser, JSONFormat
from tgi_router.text.tool_parsers.pythonic import PythonicCallParser

ToolCallFormat = Literal["hermes", "llama3_json", "mistral", "pythonic"]
FORMATS: tuple[ToolCallFormat, ...] = ("hermes", "llama3_json", "mistral", "pythonic")

_JSON_FORMATS: dict[ToolCallFormat, JSONFormat] = {
    "hermes": HERMES,
    "llama3_json": LLAMA3,
    "mistral": MISTRAL,
}

# The first text that a template contains decides; those that are in several stand last.
_SIGNS: tuple[tuple[str, ToolCallFormat], ...] = (
    ("[TOOL_CALLS]", "mistral"),
    ("<tool_call>", "hermes"),
    ("<|tool_call|>", "hermes"),
    ("<|python_start|>", "pythonic"),
    ("[func_name1(", "pythonic"),
    ("<|python_tag|>", "llama3_json"),
    ('"parameters": dictionary', "llama3_json"),
)


def detect(template_source: str) -> ToolCallFormat | None:
    """The format that a template's own words show. None: it shows none that we know."""
    return next((format for sign, format in _SIGNS if sign in template_source), None)


def parser_of(format: ToolCallFormat | None, names: Collection[str]) -> Parser:
    """names: of the tools that may be called. format None: a mark of Hermes, or JSON from the first character
    on.
    """
    if format == "pythonic":
        return PythonicCallParser(names)
    return JSONCallParser(ANY if format is None else _JSON_FORMATS[format], names)
