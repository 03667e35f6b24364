"""The tools of a chat: how the model is told of them, and what it must write if it has to call one.

    auto      the model decides: it writes freely, and a parser finds the calls in what it wrote
    required  a grammar lets it write nothing but calls, named: nothing but one call of that tool
    none      the chat has no tools

TGI forced an answer to `auto` too, with a tool that stands for "none of them", and then generated once more
without tools. That cost two generations, and its usage and finish reason were those of the first.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tgi_router.text.message import CallArguments, CallName, Delta, Parser
from tgi_router.text.tool_parsers.json_calls import FORCED, JSONCallParser
from tgi_router.text.tool_parsers.registry import ToolCallFormat, parser_of

# For templates that know no tools: TGI's words, which ask for a call …
FORCED_PROMPT = (
    "\nGiven the functions available, please respond with a JSON for a function call with its proper "
    "arguments that best answers the given prompt. Respond in the format {name: function name, parameters: "
    "dictionary of argument name and its value}.Do not use variables.\n"
)
# … and ours, which leave the model the choice.
AUTO_PROMPT = (
    '\nTo call one of these functions, respond with <tool_call>{"name": function name, "arguments": '
    "dictionary of argument name and its value}</tool_call> and nothing else. If none of them helps, respond "
    "as usual.\n"
)

# Formats whose models are used to write several calls in one answer.
_WITH_SEVERAL_CALLS: tuple[ToolCallFormat | None, ...] = ("hermes", "mistral", "pythonic")
# Where models expect arguments under the name of `parameters`, as TGI's prompt asks.
_WITH_PARAMETERS: tuple[ToolCallFormat | None, ...] = ("llama3_json", None)

MAX_SCHEMA_DEPTH = 100

Schema = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    description: str | None
    parameters: Schema  # JSON Schema of an object

    def for_template(self) -> dict[str, Any]:
        """As templates know tools from transformers."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": {**function, "parameters": self.parameters}}


@dataclass(frozen=True, slots=True)
class Offer:
    """What a request lets the model call; at least one tool."""

    tools: tuple[Tool, ...]
    is_forced: bool  # the answer is a call
    is_parallel: bool  # it may hold several

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.name for tool in self.tools)

    def for_template(self) -> list[dict[str, Any]]:
        return [tool.for_template() for tool in self.tools]

    def parser(self, format: ToolCallFormat | None) -> Parser:
        """Of one answer."""
        if self.is_forced:
            return JSONCallParser(FORCED, self.names)
        parser = parser_of(format, self.names)
        return parser if self.is_parallel else OneCall(parser)

    def schema(self, format: ToolCallFormat | None) -> Schema:
        """Of the JSON text that is the whole answer if a call is forced: an object, or an array of them."""
        key = "parameters" if format in _WITH_PARAMETERS else "arguments"
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": tool.name}, key: {"$ref": f"#/$defs/{index}"}},
                "required": ["name", key],
                "additionalProperties": False,
            }
            for index, tool in enumerate(self.tools)
        ]
        one: Schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
        if self.is_parallel and format in _WITH_SEVERAL_CALLS:
            one = {"type": "array", "items": one, "minItems": 1}
        return one | {"$defs": {str(i): _embedded(tool.parameters, i) for i, tool in enumerate(self.tools)}}

    def with_prompt(
        self, messages: Sequence[Mapping[str, Any]], tool_prompt: str | None, *, template_reads_tools: bool
    ) -> list[dict[str, Any]]:
        """The messages, the last one that is not the assistant's with what the model must know of the tools.

        Models whose template reads tools know all that; only words of the client's own are added.
        """
        text = "\n---\n"
        if not template_reads_tools:
            text += json.dumps(self.for_template(), ensure_ascii=False, separators=(",", ":")) + "\n"
            text += tool_prompt or (FORCED_PROMPT if self.is_forced else AUTO_PROMPT)
        elif tool_prompt:
            text += tool_prompt
        else:
            return [dict(message) for message in messages]
        told = [dict(message) for message in messages]
        for message in reversed(told):
            if message.get("role") != "assistant":
                message["content"] = (message.get("content") or "") + text
                break
        return told


def is_too_deep(value: Any) -> bool:
    """Whether JSON is nested deeper than any schema needs, and than those who walk through it can go."""
    level = [value]
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


class OneCall:
    """The first call alone, for clients that want no more."""

    def __init__(self, parser: Parser) -> None:
        self.shown_special = parser.shown_special
        self._parser = parser

    def push(self, text: str) -> list[Delta]:
        return self._of_first(self._parser.push(text))

    def finish(self) -> list[Delta]:
        return self._of_first(self._parser.finish())

    def _of_first(self, deltas: list[Delta]) -> list[Delta]:
        return [
            delta for delta in deltas if not (isinstance(delta, CallName | CallArguments) and delta.index > 0)
        ]


_ABOUT_THE_DOCUMENT = ("$schema", "$id")
_SAYS_WHAT_IT_IS = ("type", "$ref", "anyOf", "oneOf", "allOf", "const", "enum")
_NOT_SCHEMAS = ("const", "enum", "default", "examples")


def _embedded(schema: Schema, index: int) -> Schema:
    """A tool's schema at its new place: references within it start from there."""
    root = f"#/$defs/{index}"

    def moved(value: Any, *, is_schema: bool) -> Any:
        if isinstance(value, list):
            return [moved(element, is_schema=True) for element in value]
        if not isinstance(value, dict):
            return value
        out = {}
        for key, inner in value.items():
            if is_schema and key in _NOT_SCHEMAS:
                out[key] = inner
            elif is_schema and key == "$ref" and isinstance(inner, str) and inner.startswith("#"):
                out[key] = root + inner[1:]
            else:
                # Names of properties and definitions are not keywords.
                names = is_schema and key in ("properties", "patternProperties", "$defs", "definitions")
                out[key] = moved(inner, is_schema=not names)
        return out

    top = {key: value for key, value in schema.items() if key not in _ABOUT_THE_DOCUMENT}
    if not any(key in top for key in _SAYS_WHAT_IT_IS):
        top["type"] = "object"
    result: Schema = moved(top, is_schema=True)
    return result
