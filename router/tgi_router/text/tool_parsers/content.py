"""The words around calls. White space that only sets calls apart from them is not told."""

from tgi_router.text.message import Content, Delta


class Words:
    """Content of one answer; an answer without calls keeps every character."""

    __slots__ = ("_has_calls", "_held", "_is_behind_call")

    def __init__(self) -> None:
        self._held = ""  # white space that may stand before a call
        self._has_calls = False
        self._is_behind_call = False

    def push(self, text: str, deltas: list[Delta]) -> None:
        if self._is_behind_call:
            text = text.lstrip()
        words = text.rstrip()
        if not words:
            self._held += text
            return
        deltas.append(Content(self._held + words))
        self._held = text[len(words) :]
        self._is_behind_call = False

    def call(self) -> None:
        """A call stands here."""
        self._held = ""
        self._has_calls = self._is_behind_call = True

    def finish(self, deltas: list[Delta]) -> None:
        if self._held and not self._has_calls:
            deltas.append(Content(self._held))
        self._held = ""


def overlap(text: str, markers: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that is a proper beginning of a marker."""
    longest = max(map(len, markers), default=1) - 1
    for length in range(min(len(text), longest), 0, -1):
        end = text[len(text) - length :]
        if any(len(marker) > length and marker.startswith(end) for marker in markers):
            return length
    return 0
