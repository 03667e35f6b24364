"""One call written as a JSON object: {"name": "f", "arguments": {…}}, while it is written."""

import json
from collections.abc import Collection

from tgi_router.text.message import CallArguments, CallName, Delta
from tgi_router.text.tool_parsers.json_text import SPACE, JSONText

NAME_KEYS = ("name", "function")
ARGUMENT_KEYS = ("arguments", "parameters")
OTHER_KEYS = ("id", "type", "index")  # some models write them; they say nothing that we need


class CallObject:
    """It counts as a call once its name and the beginning of its arguments are known; before that, a text
    that cannot become a call of one of the tools breaks it.

    Arguments are told as they are written; a missing value is `{}`, a string is taken for their JSON text.
    """

    def __init__(self, index: int, names: Collection[str]) -> None:
        self.is_call = False
        self.is_complete = False
        self.is_broken = False
        self._index = index
        self._names = names
        self._name: str | None = None
        self._early = ""  # arguments before the name
        self._has_arguments = False
        self._expects = "{"
        self._key = ""
        self._value = JSONText()
        self._value_text = ""

    def push(self, text: str, start: int, deltas: list[Delta]) -> int:
        """Take characters from `start` on, until the object is complete or broken; where it stopped."""
        position = start
        while position < len(text) and not self.is_complete and not self.is_broken:
            if self._expects in ("key", "value"):
                position = self._take_value(text, position, deltas)
            elif text[position] in SPACE or self._take_mark(text[position], deltas):
                position += 1
        return position

    def _take_mark(self, mark: str, deltas: list[Delta]) -> bool:
        """Whether the character is used up."""
        match self._expects, mark:
            case "{", "{":
                self._expects = "key or }"
            case "key or }", '"':
                self._begin("key")
                return False
            case (("key or }" | ", or }"), "}"):
                self._end(deltas)
            case ":", ":":
                self._expects = "value or space"
            case "value or space", _:
                self._begin("value")
                return False
            case ", or }", ",":
                self._expects = 'key"'
            case 'key"', '"':
                self._begin("key")
                return False
            case _:
                self.is_broken = True
        return not self.is_broken

    def _begin(self, what: str) -> None:
        self._expects, self._value, self._value_text = what, JSONText(), ""

    def _take_value(self, text: str, position: int, deltas: list[Delta]) -> int:
        is_first = not self._value_text
        end, told = self._value.push(text, position)
        is_value = self._expects == "value"
        if is_value and self._key in ARGUMENT_KEYS and (self._value_text or told).startswith("{"):
            if is_first:
                self._value_text = "{"  # the rest is told, not kept
                self._has_arguments = True
                if self._name is not None:
                    self._commit(deltas)
            self._tell(told, deltas)
        else:
            self._value_text += told
        if self._value.is_broken:
            self.is_broken = True
        elif self._value.is_complete:
            if is_value:
                self._end_value(deltas)
                self._expects = ", or }"
            else:
                self._end_key()
                self._expects = ":"
        return end

    def _end_key(self) -> None:
        self._key = json.loads(self._value_text)
        is_repeated = (self._key in NAME_KEYS and self._name is not None) or (
            self._key in ARGUMENT_KEYS and self._has_arguments
        )
        is_known = self._key in (*NAME_KEYS, *ARGUMENT_KEYS, *OTHER_KEYS)
        self.is_broken = is_repeated or not (is_known or self.is_call)

    def _end_value(self, deltas: list[Delta]) -> None:
        if self._key in NAME_KEYS:
            # Only a string is decoded: anything else may be nested deeper than the decoder goes.
            name = json.loads(self._value_text) if self._value_text[0] == '"' else None
            if name not in self._names:
                self.is_broken = True
                return
            self._name = name
            if self._has_arguments:
                self._commit(deltas)
        elif self._key in ARGUMENT_KEYS and not self._value_text.startswith("{"):
            self._end_other_arguments(deltas)

    def _end_other_arguments(self, deltas: list[Delta]) -> None:
        value = json.loads(self._value_text) if self._value_text[0] in '"n' else 0
        if value is None:
            return  # as if the key were not there
        if not isinstance(value, str) or not _is_unicode(value):
            self.is_broken = True
            return
        self._has_arguments = True
        if self._name is not None:
            self._commit(deltas)
        self._tell(value, deltas)

    def _end(self, deltas: list[Delta]) -> None:
        if self._name is None:
            self.is_broken = True
            return
        if not self._has_arguments:
            self._commit(deltas)
            self._tell("{}", deltas)
        self.is_complete = True

    def _commit(self, deltas: list[Delta]) -> None:
        assert self._name is not None
        self.is_call = True
        deltas.append(CallName(self._index, self._name))
        self._tell(self._early, deltas)
        self._early = ""

    def _tell(self, text: str, deltas: list[Delta]) -> None:
        if not self.is_call:
            self._early += text
        elif text:
            deltas.append(CallArguments(self._index, text))


def _is_unicode(text: str) -> bool:
    """Half a surrogate pair can be written in JSON, but not be sent."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
