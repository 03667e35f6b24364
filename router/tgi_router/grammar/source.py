"""What a client asked for -> text that llguidance compiles. Refuses what is malformed or too large.

A schema keeps its meaning, with three of TGI's habits: between the tokens of JSON stands at most one space;
what has named properties is an object; and it has no others (where that may be said without contradicting
another part of the schema).
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from llguidance import LLMatcher, regex_to_lark

Kind = Literal["json", "regex", "lark"]

MAX_JSON_CHARACTERS = 100_000
MAX_JSON_DEPTH = 48
MAX_WRITTEN_OUT = 1_000_000  # parts of a schema, once every $ref is replaced by what it refers to
MAX_REGEX_CHARACTERS = 10_000
MAX_REGEX_EXPANSION = 100_000  # characters, once every counted repetition is written out
MAX_LARK_CHARACTERS = 50_000

JSON_OPTIONS = {
    "whitespace_flexible": False,
    "whitespace_pattern": "[ ]?",
    "coerce_one_of": True,  # alternatives that may overlap are anyOf, as in TGI
    "lenient": False,  # a keyword that would not be enforced is refused
}

_COUNT = re.compile(r"\{(\d+)(,(\d*))?\}")
_SUBSCHEMAS = ("items", "additionalProperties", "unevaluatedProperties", "unevaluatedItems")
_LISTS_OF_SUBSCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS_OF_SUBSCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_COMBINES = ("properties", "patternProperties", "additionalProperties", "$ref", "anyOf", "oneOf")


class GrammarError(Exception):
    """A grammar cannot be followed; the text is for its client."""

    @classmethod
    def invalid(cls, reason: object) -> "GrammarError":
        return cls(f"grammar is not valid: {reason}")


@dataclass(frozen=True, slots=True)
class AskedGrammar:
    """As a client wrote it; nothing is checked yet."""

    kind: Kind
    value: Any  # json: an object, or a string that holds one; else a string
    needs_properties: bool = False  # TGI's rule for its own ways to send a schema


@dataclass(frozen=True, slots=True)
class Source:
    kind: Kind
    text: str

    def grammar(self) -> str:
        """In llguidance's own language."""
        if self.kind == "json":
            return LLMatcher.grammar_from_json_schema(self.text, overrides=JSON_OPTIONS)  # type: ignore[arg-type]
        if self.kind == "regex":
            # As in TGI \d, \w and \s are ASCII's.
            return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(self.text, 'dws')}/")
        return LLMatcher.grammar_from_lark(self.text)


def source_of(asked: AskedGrammar) -> Source:
    """Raises GrammarError."""
    if asked.kind == "json":
        return Source("json", _schema_text(asked.value, asked.needs_properties))
    text = asked.value
    if not isinstance(text, str):
        raise GrammarError("grammar is not supported")
    if asked.kind == "regex":
        _check_regex(text)
    else:
        _check_length(text, MAX_LARK_CHARACTERS)
    return Source(asked.kind, text)


def _check_length(text: str, limit: int) -> None:
    if len(text) > limit:
        raise GrammarError.invalid(f"it has {len(text)} characters, more than {limit}")


# JSON Schema


def _schema_text(value: Any, needs_properties: bool) -> str:
    if isinstance(value, str):
        _check_length(value, MAX_JSON_CHARACTERS)
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise GrammarError.invalid(error) from error
    if not isinstance(value, dict):
        raise GrammarError("grammar is not supported")
    if _depth(value) > MAX_JSON_DEPTH:
        raise GrammarError.invalid(f"it is nested more than {MAX_JSON_DEPTH} levels deep")
    if needs_properties and "properties" not in value:
        raise GrammarError.invalid("Grammar must have a 'properties' field")
    schemas = list(_subschemas(value))
    for schema in schemas:
        if isinstance(pattern := schema.get("pattern"), str):
            _check_regex(pattern)
    _check_expansion(value)
    if not any(_merges(schema) for schema in schemas):
        value = _closed(value)
    text = json.dumps(value)
    _check_length(text, MAX_JSON_CHARACTERS)
    return text


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level and depth <= MAX_JSON_DEPTH:
        depth += 1
        level = [inner for one in level for inner in _inside(one) if isinstance(inner, (dict, list))]
    return depth


def _inside(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def _children(schema: dict[str, Any]) -> Iterator[Any]:
    for key in _SUBSCHEMAS:
        if isinstance(child := schema.get(key), dict):
            yield child
    for key in _LISTS_OF_SUBSCHEMAS:
        if isinstance(children := schema.get(key), list):
            yield from children
    for key in _MAPS_OF_SUBSCHEMAS:
        if isinstance(named := schema.get(key), dict):
            yield from named.values()


def _subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    """The schema and all inside it."""
    if isinstance(schema, dict):
        yield schema
        for child in _children(schema):
            yield from _subschemas(child)


def _merges(schema: dict[str, Any]) -> bool:
    """Whether several parts say together what an object's properties are: none is the last word then."""
    all_of = schema.get("allOf")
    num_parts = sum(key in schema for key in _COMBINES) - ("additionalProperties" in schema)
    return num_parts + (len(all_of) if isinstance(all_of, list) else 0) > 1


def _closed(schema: Any) -> Any:
    """With what TGI understands where an object's properties are named: no others, if none are spoken of."""
    if not isinstance(schema, dict):
        return schema
    closed = dict(schema)
    for key in _SUBSCHEMAS:
        if isinstance(schema.get(key), dict):
            closed[key] = _closed(schema[key])
    for key in _LISTS_OF_SUBSCHEMAS:
        if isinstance(schema.get(key), list):
            closed[key] = [_closed(child) for child in schema[key]]
    for key in _MAPS_OF_SUBSCHEMAS:
        if isinstance(schema.get(key), dict):
            closed[key] = {name: _closed(child) for name, child in schema[key].items()}
    properties, required = schema.get("properties"), schema.get("required", [])
    if isinstance(properties, dict):
        closed.setdefault("type", "object")
    if (
        isinstance(properties, dict)
        and isinstance(required, list)
        and all(name in properties for name in required if isinstance(name, str))
        and not any(
            key in schema
            for key in ("additionalProperties", "unevaluatedProperties", "patternProperties", "minProperties")
        )
    ):
        closed["additionalProperties"] = False
    return closed


def _check_expansion(root: dict[str, Any]) -> None:
    """A few definitions that refer to one another twice each stand for a document of any size."""
    try:
        size = _written_out(root, root, frozenset(), {})
    except RecursionError as error:
        raise GrammarError.invalid("its references form too long a chain") from error
    if size > MAX_WRITTEN_OUT:
        raise GrammarError.invalid(f"written out, its references stand for more than {MAX_WRITTEN_OUT} parts")


def _written_out(schema: Any, root: dict[str, Any], open_refs: frozenset[str], sizes: dict[str, int]) -> int:
    """In how many parts. sizes: of the references that were met before."""
    if not isinstance(schema, dict):
        return 1
    total = 1
    for key in ("$defs", "definitions"):
        if key in schema:  # counted where it is referred to
            schema = {name: value for name, value in schema.items() if name != key}
    ref = schema.get("$ref")
    if isinstance(ref, str) and ref not in open_refs:  # a recursion counts once
        if ref not in sizes:
            sizes[ref] = _written_out(_resolve(root, ref), root, open_refs | {ref}, sizes)
        total += sizes[ref]
    return total + sum(_written_out(child, root, open_refs, sizes) for child in _children(schema))


def _resolve(root: dict[str, Any], ref: str) -> Any:
    """What a local `#/a/b` refers to; None if nothing, which the compiler complains about."""
    if not ref.startswith("#/"):
        return None
    target: Any = root
    for part in ref[2:].split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        target = target.get(name) if isinstance(target, dict) else None
    return target


# Regular expressions


def _check_regex(regex: str) -> None:
    _check_length(regex, MAX_REGEX_CHARACTERS)
    size = _expansion(regex)
    if size > MAX_REGEX_EXPANSION:
        raise GrammarError.invalid(
            f"with its repetitions written out the regex has more than {MAX_REGEX_EXPANSION} characters"
        )


def _expansion(regex: str) -> int:
    """About how many characters it has with counted repetitions written out.

    What is malformed is the compiler's to say.
    """
    sizes, last = [0], 0  # of the open groups; of what a repetition would repeat
    position = 0
    while position < len(regex):
        character = regex[position]
        if character == "(":
            sizes.append(0)
            last = 0
        elif character == ")" and len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] += last
        elif character == "{" and (count := _COUNT.match(regex, position)) is not None:
            times = max(int(count[3] or count[1]), 1) if len(count[0]) < 20 else MAX_REGEX_EXPANSION
            sizes[-1] += last * (times - 1)
            last *= times
            position = count.end() - 1
        elif character not in "|*+?":
            if character == "\\":
                position += 1
            elif character == "[":
                position = _class_end(regex, position)
            last = 1
            sizes[-1] += 1
        position += 1
    return sum(sizes)


def _class_end(regex: str, start: int) -> int:
    """Index of the bracket that closes a character class; the last index if none does."""
    position = start + 1
    while position < len(regex) - 1 and (regex[position] != "]" or position == start + 1):
        position += 2 if regex[position] == "\\" else 1
    return position
