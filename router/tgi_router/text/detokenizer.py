"""Token ids -> text as they come: a character whose bytes are spread over tokens appears once, whole.

What a token adds to a text depends on its neighbours (spaces at word starts, bytes of a character), so it is
decoded behind a little context, and what has been told already is cut off. When the text ends cleanly, the
context moves on:

    … context | held: tokens since the last clean end
    `told`, a beginning of the text of both
"""

from collections.abc import Callable, Collection, Sequence

UNFINISHED = "\ufffd"  # what decoders write for bytes that are no character yet
MAX_HELD_TOKENS = 32  # bytes that make no sense for so long never will

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """One sequence's text so far. Special tokens stand for themselves, and end what was held back.

    context: a few ids before the first one pushed.
    """

    __slots__ = ("_context", "_decode", "_held", "_special_ids", "_told")

    def __init__(self, decode: Decode, special_ids: Collection[int], context: Sequence[int]) -> None:
        self._decode = decode
        self._special_ids = special_ids
        self._context = list(context)
        self._told = decode(self._context)
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        if token_id in self._special_ids and self._held:
            # Half a character before a special token stays half.
            self._held = []
            self._told = self._decode(self._context)
        self._held.append(token_id)
        text = self._decode(self._context + self._held)
        if text.endswith(UNFINISHED) and len(self._held) < MAX_HELD_TOKENS:
            return self._tell_whole_part(text)
        added = text[len(self._told) :]
        if added or len(self._held) >= MAX_HELD_TOKENS:
            self._context = self._held
            self._told = self._decode(self._held)
            self._held = []
        return added

    def flush(self) -> str:
        """What was held back, without the unfinished character: the sequence is over."""
        return self._tell_whole_part(self._decode(self._context + self._held)) if self._held else ""

    def _tell_whole_part(self, text: str) -> str:
        whole = without_unfinished_end(text)
        # Some decoders give up a whole run of bytes for one that is missing; then what was told is not in it.
        if not whole.startswith(self._told):
            return ""
        added = whole[len(self._told) :]
        self._told = whole
        return added


def final_text(
    decode: Decode, special_ids: Collection[int], context: Sequence[int], token_ids: Sequence[int]
) -> str:
    """The whole answer without special tokens and without an unfinished character at its end.

    context: ids before the answer; their text is cut off.
    """
    before = [token_id for token_id in context if token_id not in special_ids]
    visible = [token_id for token_id in token_ids if token_id not in special_ids]
    text = decode(before + visible)
    if visible and text.endswith(UNFINISHED):
        # The bytes of the last character may have tokens of their own, and may spoil those before them.
        shorter = (decode(before + visible[:-num_dropped]) for num_dropped in (1, 2, 3))
        candidates = (without_unfinished_end(text), *shorter)
        clean = [candidate for candidate in candidates if not candidate.endswith(UNFINISHED)]
        text = max(clean, key=len, default=candidates[0])
    return text[len(decode(before)) :]


def without_unfinished_end(text: str) -> str:
    """Decoders write one mark for the bytes of an unfinished character, or one for each: at most three."""
    for _ in range(3):
        text = text.removesuffix(UNFINISHED)
    return text
