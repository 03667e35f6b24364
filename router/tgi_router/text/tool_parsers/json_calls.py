"""Calls written as JSON objects: alone, in a list, or one behind the other, with or without marks around:

Hermes, Qwen    <tool_call>{"name": "f", "arguments": {…}}</tool_call>
Granite, Phi    <|tool_call|>[{"name": "f", "arguments": {…}}]
Llama 3         {"name": "f", "parameters": {…}}; {…}      perhaps behind <|python_tag|>
Mistral         [TOOL_CALLS] [{"name": "f", "arguments": {…}}, {…}]   or [TOOL_CALLS]f{…}
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

from tgi_router.text.message import CallArguments, CallName, Delta
from tgi_router.text.tool_parsers.call_object import CallObject
from tgi_router.text.tool_parsers.content import Words, overlap
from tgi_router.text.tool_parsers.json_text import JSONText

_SEPARATORS = ",;[]"
_NAME = re.compile(r"[\w.\-]+")
_HEAD = re.compile(r"\s*(\[CALL_ID\]\w*\s*)?(\[ARGS\]\s*)?")  # between name and arguments
_MAX_HEAD = 64


@dataclass(frozen=True, slots=True)
class JSONFormat:
    opening: tuple[str, ...] = ()  # behind any of these stand calls
    closing: tuple[str, ...] = ()
    # Whether an answer may begin with a call, without a mark. Then it must begin with one of these.
    bare: tuple[str, ...] = ()
    has_named_calls: bool = False  # f{…} and f[ARGS]{…} too, the name outside of the JSON


HERMES = JSONFormat(("<tool_call>", "<|tool_call|>"), ("</tool_call>", "<|/tool_call|>"))
# For templates that know no tools: what we ask for is Hermes's form, what a client's own `tool_prompt` asks
# for is probably bare JSON.
ANY = JSONFormat(HERMES.opening, HERMES.closing, bare=("{", "[{"))
LLAMA3 = JSONFormat(("<|python_tag|>",), bare=("{",))
MISTRAL = JSONFormat(("[TOOL_CALLS]",), bare=("[{",), has_named_calls=True)
# What our grammar for forced calls writes.
FORCED = JSONFormat(bare=("{", "[{", "[]"))

_ARGUMENT_MARKS = ("[ARGS]", "[CALL_ID]")


class JSONCallParser:
    """Reads the answer from left to right; `_held` is what it has not decided on yet.

    words -> (a mark, or a bare beginning) -> between calls <-> in a call -> words
    """

    def __init__(self, format: JSONFormat, names: Collection[str]) -> None:
        marks = (*format.opening, *format.closing)
        self.shown_special = frozenset((*marks, *_ARGUMENT_MARKS) if format.has_named_calls else marks)
        self._format = format
        self._names = names
        self._held = ""
        self._step = self._begin
        self._words = Words()
        self._num_calls = 0
        self._is_behind_call = False  # of the place that is being read
        self._object: CallObject | None = None
        self._arguments: JSONText | None = None
        # What stands since the last word or call: content, should no call come of it.
        self._raw = ""

    def push(self, text: str) -> list[Delta]:
        self._held += text
        deltas: list[Delta] = []
        while self._held and self._step(deltas):
            pass
        return deltas

    def finish(self) -> list[Delta]:
        is_cut_mark = self._is_behind_call and not self._raw and self._step == self._between
        deltas: list[Delta] = []
        self._give_up(deltas)
        if not is_cut_mark:
            self._words.push(self._held, deltas)
        self._words.finish(deltas)
        return deltas

    # Steps: take what can be decided off `_held`. False: more text is needed.

    def _begin(self, deltas: list[Delta]) -> bool:
        """The answer's first characters, where a call may stand without a mark."""
        text = self._held.lstrip()
        squeezed = re.sub(r"\s", "", text[:1]) + re.sub(r"\s", "", text[1:])[:1]
        if any(bare.startswith(squeezed) and bare != squeezed for bare in self._format.bare):
            return False
        is_bare = any(squeezed.startswith(bare) for bare in self._format.bare)
        self._step = self._between if is_bare else self._in_words
        return True

    def _in_words(self, deltas: list[Delta]) -> bool:
        found = [(start, mark) for mark in self._format.opening if (start := self._held.find(mark)) >= 0]
        if found:
            start, mark = min(found)
            self._words.push(self._held[:start], deltas)
            self._raw = mark
            self._held = self._held[start + len(mark) :]
            self._step = self._between
            return True
        cut = len(self._held) - overlap(self._held, self._format.opening)
        self._words.push(self._held[:cut], deltas)
        self._held = self._held[cut:]
        return False

    def _between(self, deltas: list[Delta]) -> bool:
        """Before, between and behind the calls of one place."""
        for mark in (*self._format.closing, *self._format.opening):
            if self._held.startswith(mark):
                self._pass_by(mark, is_opening=mark in self._format.opening)
                if mark in self._format.closing:
                    self._give_up(deltas)
                return True
            if mark.startswith(self._held):
                return False
        first = self._held[0]
        if first == "{":
            self._object = CallObject(self._num_calls, self._names)
            self._step = self._in_object
        elif first.isspace() or first in _SEPARATORS or (first == "}" and self._is_behind_call):
            self._pass_by(first)  # one brace too many is a common slip
        elif self._format.has_named_calls and _NAME.match(self._held):
            self._step = self._in_name
        else:
            self._give_up(deltas)
        return True

    def _pass_by(self, text: str, *, is_opening: bool = False) -> None:
        """Behind a call, what sets calls apart is nobody's content."""
        if self._raw or is_opening or not self._is_behind_call:
            self._raw += text
        self._held = self._held[len(text) :]

    def _in_object(self, deltas: list[Delta]) -> bool:
        call = self._object
        assert call is not None
        was_call = call.is_call
        end = call.push(self._held, 0, deltas)
        if call.is_call and not was_call:
            self._count_call()
        if not call.is_call:
            self._raw += self._held[:end]
        self._held = self._held[end:]
        if call.is_complete:
            self._step = self._between
        elif call.is_broken:
            self._give_up(deltas)
        return call.is_complete or call.is_broken

    def _in_name(self, deltas: list[Delta]) -> bool:
        """f{…}, f[ARGS]{…}, f[CALL_ID]…[ARGS]{…}"""
        head, brace, _ = self._held.partition("{")
        found = _NAME.match(head)
        assert found is not None
        name, rest = found.group(), head[found.end() :]
        if not brace:
            may_become = name in self._names if rest else any(known.startswith(name) for known in self._names)
            if may_become and len(rest) <= _MAX_HEAD:
                return False
        if not brace or name not in self._names or len(rest) > _MAX_HEAD or not _HEAD.fullmatch(rest):
            self._give_up(deltas)
            return True
        deltas.append(CallName(self._num_calls, name))
        self._count_call()
        self._held = self._held[len(head) :]
        self._arguments = JSONText()
        self._step = self._in_arguments
        return True

    def _in_arguments(self, deltas: list[Delta]) -> bool:
        arguments = self._arguments
        assert arguments is not None
        end, told = arguments.push(self._held, 0)
        if told:
            deltas.append(CallArguments(self._num_calls - 1, told))
        self._held = self._held[end:]
        if arguments.is_complete:
            self._step = self._between
        elif arguments.is_broken:
            self._give_up(deltas)
        return arguments.is_complete or arguments.is_broken

    def _count_call(self) -> None:
        self._num_calls += 1
        self._raw = ""
        self._is_behind_call = True
        self._words.call()

    def _give_up(self, deltas: list[Delta]) -> None:
        """No further call comes of this place; on with words."""
        raw, self._raw = self._raw, ""
        self._words.push(raw, deltas)
        self._is_behind_call = False
        self._step = self._in_words
