"""What the model says, piece by piece: plain words, thoughts, and calls of tools.

A parser reads the growing text of one answer and tells deltas; a stream sends them as they come, and an
answer in one piece is their fold. So the two are equal whatever the text is and wherever its pieces begin.
"""

from dataclasses import dataclass, field
from typing import Protocol

from msgspec import Struct


class Content(Struct, frozen=True, gc=False):
    text: str


class Reasoning(Struct, frozen=True, gc=False):
    text: str


class CallName(Struct, frozen=True, gc=False):
    """A call begins. Deltas of one call follow one another; `index` counts the calls of an answer."""

    index: int
    name: str


class CallArguments(Struct, frozen=True, gc=False):
    """The next piece of the JSON text of a call's arguments."""

    index: int
    text: str


Delta = Content | Reasoning | CallName | CallArguments


class Parser(Protocol):
    """One answer's reader. No text is an error: what it does not understand is content."""

    @property
    def shown_special(self) -> frozenset[str]:
        """Special tokens that the parser must see; others never reach it."""

    def push(self, text: str) -> list[Delta]:
        """What the text so far adds; what could still become something else is held back."""

    def finish(self) -> list[Delta]:
        """The answer is over: what was held back."""


class PlainText:
    """For answers that are nothing but content."""

    shown_special: frozenset[str] = frozenset()

    def push(self, text: str) -> list[Delta]:
        return [Content(text)] if text else []

    def finish(self) -> list[Delta]:
        return []


@dataclass(slots=True)
class Call:
    name: str
    arguments: str = ""  # JSON text; cut short if the answer was


@dataclass(slots=True)
class Message:
    """The fold of an answer's deltas."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        match delta:
            case Content(text):
                self.content += text
            case Reasoning(text):
                self.reasoning += text
            case CallName(index, name):
                assert index == len(self.calls)
                self.calls.append(Call(name))
            case CallArguments(index, text):
                self.calls[index].arguments += text
