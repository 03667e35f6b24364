"""One JSON value, checked and told while it is written (RFC 8259)."""

import re
from typing import Literal

from msgspec.json import encode

SPACE = " \t\n\r"

_SPACES = re.compile(r"[ \t\n\r]*")
_IN_STRING = re.compile(r'[^"\\\x00-\x1f]+')
_IN_NUMBER = re.compile(r"[-+.eE0-9]+")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_WORDS = ("true", "false", "null")

_State = Literal[
    "value", "value or ]", "key", "key or }", ":", ", or end", "string", "escape", "hex", "number", "word"
]


class JSONText:
    """A value that grows. Its state is that of a push-down automaton: no text makes it slow or deep.

    Raw control characters within strings, which models like to write and JSON forbids, come out escaped.
    """

    __slots__ = ("_held", "_is_key", "_num_hex", "_stack", "_state", "is_broken", "is_complete")

    def __init__(self) -> None:
        self.is_complete = False
        self.is_broken = False
        self._state: _State = "value"
        self._stack: list[str] = []  # the closing brackets to come
        self._held = ""  # of a number or word
        self._is_key = False
        self._num_hex = 0

    def push(self, text: str, start: int) -> tuple[int, str]:
        """Take characters from `start` on, until the value is complete or broken.

        Where it stopped (behind the value, or at the character that breaks it), and the value's text.
        """
        position, told = start, []
        while position < len(text) and not self.is_complete and not self.is_broken:
            end, piece = self._take(text, position)
            told.append(piece)
            position = end
        return position, "".join(told)

    def _take(self, text: str, position: int) -> tuple[int, str]:
        """At least one character, or a change of state."""
        character = text[position]
        match self._state:
            case "string":
                return self._take_string(text, position)
            case "escape":
                if character not in '"\\/bfnrtu':
                    return self._break(position)
                self._num_hex = 0
                self._state = "hex" if character == "u" else "string"
                return position + 1, character
            case "hex":
                if character not in "0123456789abcdefABCDEF":
                    return self._break(position)
                self._num_hex += 1
                if self._num_hex == 4:
                    self._state = "string"
                return position + 1, character
            case "number":
                return self._take_number(text, position)
            case "word":
                self._held += character
                if self._held in _WORDS:
                    self._end_value()
                elif not any(word.startswith(self._held) for word in _WORDS):
                    return self._break(position)
                return position + 1, character
        if character in SPACE:
            spaces = _SPACES.match(text, position)
            assert spaces is not None
            return spaces.end(), spaces.group()
        return self._take_mark(character, position)

    def _take_mark(self, character: str, position: int) -> tuple[int, str]:
        """A character between values, or the first of one."""
        state = self._state
        if state == ":" and character == ":":
            self._state = "value"
        elif state == ", or end" and character == ",":
            self._state = "key" if self._stack[-1] == "}" else "value"
        elif state in (", or end", "key or }", "value or ]") and character == self._stack[-1]:
            self._stack.pop()
            self._end_value()
        elif state in ("key", "key or }") and character == '"':
            self._state, self._is_key = "string", True
        elif state in ("value", "value or ]"):
            self._begin_value(character)
            if self._state == "number":
                return position, ""
        else:
            self.is_broken = True
        return (position, "") if self.is_broken else (position + 1, character)

    def _begin_value(self, character: str) -> None:
        if character == "{":
            self._stack.append("}")
            self._state = "key or }"
        elif character == "[":
            self._stack.append("]")
            self._state = "value or ]"
        elif character == '"':
            self._state, self._is_key = "string", False
        elif character in "tfn":
            self._state, self._held = "word", character
        elif character in "-0123456789":
            self._state, self._held = "number", ""
        else:
            self.is_broken = True

    def _take_string(self, text: str, position: int) -> tuple[int, str]:
        if (run := _IN_STRING.match(text, position)) is not None:
            return run.end(), run.group()
        character = text[position]
        if character == "\\":
            self._state = "escape"
        elif character == '"':
            if self._is_key:
                self._state = ":"
            else:
                self._end_value()
        else:
            character = encode(character).decode()[1:-1]
        return position + 1, character

    def _take_number(self, text: str, position: int) -> tuple[int, str]:
        if (run := _IN_NUMBER.match(text, position)) is not None:
            self._held += run.group()
            return run.end(), run.group()
        if _NUMBER.fullmatch(self._held) is None:
            return self._break(position)
        self._end_value()
        return position, ""

    def _end_value(self) -> None:
        self._state = ", or end"
        self.is_complete = not self._stack

    def _break(self, position: int) -> tuple[int, str]:
        self.is_broken = True
        return position, ""
