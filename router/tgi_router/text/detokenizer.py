"""Token ids -> text as they come: a character whose bytes are spread over tokens appears once, whole, with its last.

What a token adds to a text depends on its neighbours (spaces at word starts, bytes of a character), so each time the
ids since the last whole piece are decoded behind a little context, and the context's own text is cut off. Two marks:

    … ids of context … | ids already told | ids held back: an unfinished character
           prefix_offset             read_offset
"""

from collections.abc import Callable, Collection, Sequence

UNFINISHED = "\ufffd"  # what decoders write for bytes that are no character yet
# A character has at most four bytes, so a tail that is still none after this many tokens never becomes one.
MAX_HELD_TOKENS = 8

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """One sequence's text so far. Special tokens stand for themselves, and end what was held back.

    context: a few ids before the first one pushed.
    """

    __slots__ = ("_context", "_decode", "_held", "_prefix", "_special_ids")

    def __init__(self, decode: Decode, special_ids: Collection[int], context: Sequence[int]) -> None:
        self._decode = decode
        self._special_ids = special_ids
        self._context = list(context)
        self._prefix = decode(self._context)
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        if token_id in self._special_ids:
            self._held = []  # half a character before a special token stays half
        self._held.append(token_id)
        text = self._decode(self._context + self._held)
        is_unfinished = text.endswith(UNFINISHED) or len(text) <= len(self._prefix)
        if is_unfinished and len(self._held) < MAX_HELD_TOKENS:
            return ""
        added = text[len(self._prefix) :]
        self._context = self._held
        self._prefix = self._decode(self._held)
        self._held = []
        return added

    def flush(self) -> str:
        """What was held back, without the unfinished character: the sequence is over."""
        if not self._held:
            return ""
        text = self._decode(self._context + self._held)[len(self._prefix) :]
        self._held = []
        return without_unfinished_end(text)


def final_text(
    decode: Decode, special_ids: Collection[int], context: Sequence[int], token_ids: Sequence[int]
) -> str:
    """The whole answer without special tokens and without an unfinished character at its end.

    context: ids before the answer; their text is cut off.
    """
    before = [token_id for token_id in context if token_id not in special_ids]
    visible = [token_id for token_id in token_ids if token_id not in special_ids]
    return without_unfinished_end(decode(before + visible)[len(decode(before)) :])


def without_unfinished_end(text: str) -> str:
    """Decoders write one mark for the bytes of an unfinished character, or one for each: at most three."""
    for _ in range(3):
        text = text.removesuffix(UNFINISHED)
    return text
