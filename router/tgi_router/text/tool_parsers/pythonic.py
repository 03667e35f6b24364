"""Calls written as a Python list, as Llama 3.2 and 4 do: [f(a=1), g(b="x", c=[True, None])]"""

import ast
import re
import warnings
from collections.abc import Collection

import msgspec

from tgi_router.text.message import CallArguments, CallName, Delta
from tgi_router.text.tool_parsers.content import Words

START, END = "<|python_start|>", "<|python_end|>"

_NAME = re.compile(r"\s*([A-Za-z_][\w.\-]*)\s*\(")
_NAME_SO_FAR = re.compile(r"\s*([A-Za-z_][\w.\-]*\s*)?")
_KEY = re.compile(r"\s*([A-Za-z_]\w*)\s*=")
_KEY_SO_FAR = re.compile(r"\s*([A-Za-z_]\w*\s*)?")
_CONSTANTS = {"true": True, "false": False, "null": None}  # JSON's words, which models mix in


class PythonicCallParser:
    """Calls stand at the beginning of an answer or nowhere. An argument is told when its value is whole."""

    shown_special = frozenset((START, END))

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""
        self._step = self._begin
        self._words = Words()
        self._num_calls = 0
        self._raw = ""  # since the last call began: content, should none come of it
        self._keys: set[str] = set()
        self._key = ""
        self._value = _Extent()

    def push(self, text: str) -> list[Delta]:
        self._held += text
        deltas: list[Delta] = []
        while self._held and self._step(deltas):
            pass
        return deltas

    def finish(self) -> list[Delta]:
        deltas: list[Delta] = []
        # The piece of an argument that the end of the answer cut off has no JSON text.
        if self._step not in (self._in_value, self._in_arguments):
            self._words.push(self._raw + self._held, deltas)
        self._words.finish(deltas)
        return deltas

    # Steps: take what can be decided off `_held`. False: more text is needed.

    def _begin(self, deltas: list[Delta]) -> bool:
        text = self._held.lstrip()
        if START.startswith(text):
            return False
        if text.startswith(START):
            self._take(self._held.index(START) + len(START))
        elif text.startswith("["):
            self._take(self._held.index("[") + 1)
            self._step = self._in_name
        else:
            self._give_up(deltas)
        return True

    def _in_name(self, deltas: list[Delta]) -> bool:
        found = _NAME.match(self._held)
        if found is None:
            if _NAME_SO_FAR.fullmatch(self._held):
                return False
            self._give_up(deltas)
            return True
        name = found.group(1)
        if name not in self._names:
            self._give_up(deltas)
            return True
        deltas.append(CallName(self._num_calls, name))
        self._num_calls += 1
        self._words.call()
        self._keys.clear()
        self._take(found.end())
        self._raw = ""
        self._step = self._in_arguments
        return True

    def _in_arguments(self, deltas: list[Delta]) -> bool:
        """Behind "(" or a comma."""
        text = self._held.lstrip()
        if text.startswith(")"):
            self._tell("{}" if not self._keys else "}", deltas)
            self._held = text[1:]
            self._step = self._behind_call
            return True
        found = _KEY.match(self._held)
        if found is None:
            if _KEY_SO_FAR.fullmatch(self._held):
                return False
            self._give_up(deltas)
            return True
        self._key = found.group(1)
        if self._key in self._keys:
            self._give_up(deltas)
            return True
        self._held = self._held[found.end() :]
        self._value = _Extent()
        self._step = self._in_value
        return True

    def _in_value(self, deltas: list[Delta]) -> bool:
        end = self._value.find(self._held)
        if end is None:
            return False
        try:
            value = json_of(self._held[:end])
        except ValueError:
            self._held = f"{self._key}={self._held}"
            self._give_up(deltas)
            return True
        opening = ", " if self._keys else "{"
        self._tell(f"{opening}{msgspec.json.encode(self._key).decode()}: {value}", deltas)
        self._keys.add(self._key)
        self._held = self._held[end:].removeprefix(",")
        self._step = self._in_arguments
        return True

    def _behind_call(self, deltas: list[Delta]) -> bool:
        text = self._held.lstrip()
        if text.startswith(","):
            self._held = text[1:]
            self._step = self._in_name
        elif text.startswith("]"):
            self._held = text[1:]
            self._step = self._behind_list
        elif text:
            self._give_up(deltas)
        else:
            return False
        return True

    def _behind_list(self, deltas: list[Delta]) -> bool:
        text = self._held.lstrip()
        if END.startswith(text):
            return False
        self._held = text.removeprefix(END)
        self._step = self._in_words
        return True

    def _in_words(self, deltas: list[Delta]) -> bool:
        self._words.push(self._held, deltas)
        self._held = ""
        return False

    def _take(self, end: int) -> None:
        self._raw += self._held[:end]
        self._held = self._held[end:]

    def _give_up(self, deltas: list[Delta]) -> None:
        """No further call; all the rest is words."""
        self._words.push(self._raw, deltas)
        self._raw = ""
        self._step = self._in_words

    def _tell(self, text: str, deltas: list[Delta]) -> None:
        deltas.append(CallArguments(self._num_calls - 1, text))


class _Extent:
    """Finds the end of a Python expression: the comma or parenthesis behind it. Reads no character twice."""

    __slots__ = ("_depth", "_is_escaped", "_position", "_quote")

    def __init__(self) -> None:
        self._position = 0
        self._depth = 0
        self._quote = ""
        self._is_escaped = False

    def find(self, text: str) -> int | None:
        """text: from the expression's beginning on, longer with every call. None: it has no end yet."""
        for position in range(self._position, len(text)):
            character = text[position]
            if self._is_escaped:
                self._is_escaped = False
            elif self._quote:
                if character == "\\":
                    self._is_escaped = True
                elif character == self._quote:
                    self._quote = ""
            elif character in "\"'":
                self._quote = character
            elif character in "([{":
                self._depth += 1
            elif self._depth == 0 and character in ",)":
                return position
            elif character in ")]}":
                self._depth -= 1
        self._position = len(text)
        return None


def json_of(expression: str) -> str:
    """A Python literal as JSON text. Raises ValueError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # models write "\\d" and mean it
            tree = ast.parse(expression.strip(), mode="eval")
        return msgspec.json.encode(_plain(tree.body)).decode()
    except (ValueError, SyntaxError, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(f"not a literal: {expression!r}") from error


def _plain(node: ast.expr) -> object:
    match node:
        case ast.Constant(str() | int() | float() | None as value):
            return value
        case ast.Name(name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.UnaryOp(ast.USub() | ast.UAdd() as sign, ast.Constant(int() | float() as value)):
            return -value if isinstance(sign, ast.USub) else value
        case ast.List(elements) | ast.Tuple(elements):
            return [_plain(element) for element in elements]
        case ast.Dict(keys, values):
            return {_key(key): _plain(value) for key, value in zip(keys, values, strict=True)}
        case _:
            raise ValueError(f"not a literal: {ast.dump(node)[:80]}")


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError("JSON's keys are strings")
