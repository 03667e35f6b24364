"""Stop strings, in the two meanings that clients know. Pure: pieces of text in, whether it ends out."""

from collections.abc import Sequence


class StopAtTokenEnd:
    """TGI's meaning: the text so far, up to the end of a token, ends with a stop string; the stop string
    stays.

    One newline after the stop string does not hide it.
    """

    __slots__ = ("_endings", "_keep", "_tail")

    def __init__(self, stop: Sequence[str]) -> None:
        self._endings = tuple(ending for text in stop for ending in (text, text + "\n"))
        self._keep = max(map(len, self._endings), default=0)
        self._tail = ""

    def push(self, text: str) -> bool:
        """Take the text of one token. True: it ends here."""
        if not self._endings:
            return False
        self._tail = (self._tail + text)[-self._keep :]
        return self._tail.endswith(self._endings)


class StopAnywhere:
    """OpenAI's meaning: the text ends before the first occurrence of a stop string, wherever tokens begin
    and end.

    What could be the beginning of a stop string is held back until it is clear.
    """

    __slots__ = ("_held", "_stop")

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(text for text in stop if text)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take the text of one token: the text that may be shown now, and whether it ends here."""
        if not self._stop:
            return text, False
        text = self._held + text
        found = [start for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        num_held = max(_overlap(text, stop) for stop in self._stop)
        cut = len(text) - num_held
        self._held = text[cut:]
        return text[:cut], False

    def would_end_with(self, text: str) -> bool:
        """Whether a special token, which is not shown, completes a stop string with its own text."""
        return any(stop in self._held + text for stop in self._stop)

    def flush(self) -> str:
        """What was held back: the sequence is over for another reason."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
