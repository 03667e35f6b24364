"""A model's thoughts, set apart from its answer: <think>…</think>"""

from collections.abc import Callable
from typing import Literal

from tgi_router.text.message import Delta, Parser, Reasoning
from tgi_router.text.tool_parsers.content import overlap

OPEN, CLOSE = "<think>", "</think>"

ReasoningFormat = Literal["deepseek_r1", "qwen3"]
FORMATS: tuple[ReasoningFormat, ...] = ("deepseek_r1", "qwen3")


def detect(template_source: str) -> ReasoningFormat | None:
    """What `auto` chooses: the way of models whose template knows of thoughts."""
    return "qwen3" if CLOSE in template_source else None


def begins_in_thought(format: ReasoningFormat, prompt: str) -> bool:
    """Whether the answer to this prompt begins in the middle of a thought: the template opened it.

    deepseek_r1 thinks without saying so, unless the template has closed the thought already.
    """
    end = prompt.rstrip()
    return end.endswith(OPEN) or (format == "deepseek_r1" and not end.endswith(CLOSE))


class ReasoningParser:
    """One thought at the beginning of the answer; `answer` reads what follows it.

    White space around the thought is dropped. A thought that never ends is all there is.
    """

    def __init__(self, answer: Parser, *, is_open: bool) -> None:
        self.shown_special = answer.shown_special | {OPEN, CLOSE}
        self._answer = answer
        self._is_open = is_open
        self._held = ""
        self._step: Callable[[list[Delta]], bool] = self._begin
        self._has_thought = False

    def push(self, text: str) -> list[Delta]:
        self._held += text
        deltas: list[Delta] = []
        while self._held and self._step(deltas):
            pass
        return deltas

    def finish(self) -> list[Delta]:
        deltas: list[Delta] = []
        if self._step == self._in_thought:
            self._think(self._held, deltas)
        elif self._step == self._begin:
            deltas += self._answer.push(self._held)
        return deltas + self._answer.finish()

    # Steps: take what can be decided off `_held`. False: more text is needed.

    def _begin(self, deltas: list[Delta]) -> bool:
        text = self._held.lstrip()
        if OPEN.startswith(text):
            return False
        if text.startswith(OPEN):
            self._held = text[len(OPEN) :]
            self._step = self._in_thought
        else:
            self._step = self._in_thought if self._is_open else self._in_answer
        return True

    def _in_thought(self, deltas: list[Delta]) -> bool:
        text = self._held if self._has_thought else self._held.lstrip()
        thought, close, rest = text.partition(CLOSE)
        if close:
            self._think(thought.rstrip(), deltas)
            self._held = rest
            self._step = self._behind_thought
            return True
        cut = len(text) - overlap(text, (CLOSE,))
        end = len(text[:cut].rstrip())  # white space may be the last
        self._think(text[:end], deltas)
        self._held = text[end:]
        return False

    def _behind_thought(self, deltas: list[Delta]) -> bool:
        self._held = self._held.lstrip()
        if self._held:
            self._step = self._in_answer
        return True

    def _in_answer(self, deltas: list[Delta]) -> bool:
        deltas += self._answer.push(self._held)
        self._held = ""
        return False

    def _think(self, text: str, deltas: list[Delta]) -> None:
        if text:
            deltas.append(Reasoning(text))
            self._has_thought = True
