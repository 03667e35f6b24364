"""Token ids -> text as they come: a character whose bytes are spread over tokens appears once, whole.

What a token adds to a text depends on its neighbours (spaces at word starts, bytes of a character), so it is
decoded behind a little context, and what has been told already is cut off. When the text ends cleanly, the
context moves on:

    … context | held: tokens since the last clean end
    `told`, a beginning of the text of both

Where tokens are bytes and nothing else (byte-level BPE), whole characters do not depend on their neighbours:
what such a token says by itself is known from the last time, and nothing is decoded.
"""

from collections.abc import Callable, Collection, Sequence

UNFINISHED = "\ufffd"  # what decoders write for bytes that are no character yet
MAX_CHARACTER_BYTES = 4  # in UTF-8
MAX_HELD_TOKENS = 32  # bytes that make no sense for so long never will

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """One sequence's text so far. Special tokens stand for themselves, and end what was held back.

    context: a few ids before the first one pushed. decode_byte_level: where the tokenizer is byte-level, the
    text of a token by itself.
    """

    __slots__ = (
        "_context",
        "_decode",
        "_decode_byte_level",
        "_held",
        "_not_told",
        "_special_ids",
        "_told",
    )

    def __init__(
        self,
        decode: Decode,
        special_ids: Collection[int],
        context: Sequence[int],
        decode_byte_level: Callable[[int], str] | None = None,
    ) -> None:
        self._decode = decode
        self._decode_byte_level = decode_byte_level
        self._special_ids = special_ids
        self._context = list(context)
        self._told = whole_text(decode, self._context)
        self._not_told = decode(self._context)[len(self._told) :]  # half a character that began before
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        if self._decode_byte_level is not None and not self._held and not self._not_told:
            text = self._decode_byte_level(token_id)
            if text and UNFINISHED not in text:
                self._context = [token_id]
                self._told = text
                return text
        if token_id in self._special_ids and self._held:
            # Half a character before a special token stays half.
            self._held = []
            self._told = self._decode(self._context)
        self._held.append(token_id)
        text = self._decode(self._context + self._held)
        if text.endswith(UNFINISHED) and len(self._held) < MAX_HELD_TOKENS:
            return self._tell_whole_part(text)
        added = text[len(self._told) :]
        if self._not_told:
            added = added.removeprefix(self._not_told)
        if added or len(self._held) >= MAX_HELD_TOKENS:
            self._context = self._held
            self._told = self._decode(self._held)
            self._not_told = ""
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


def context_of(decode: Decode, token_ids: Sequence[int], num_tokens: int) -> list[int]:
    """The last ids of a prompt; up to three more where these would begin within a character."""
    for num_more in range(MAX_CHARACTER_BYTES):
        context = list(token_ids[-num_tokens - num_more :])
        if not decode(context).startswith(UNFINISHED):
            return context
    return list(token_ids[-num_tokens:])  # bytes that are no text, or an unfinished character alone


def final_text(
    decode: Decode, special_ids: Collection[int], context: Sequence[int], token_ids: Sequence[int]
) -> str:
    """The whole answer without special tokens and without an unfinished character at its end.

    context: ids before the answer; their text is cut off.
    """
    before = [token_id for token_id in context if token_id not in special_ids]
    visible = [token_id for token_id in token_ids if token_id not in special_ids]
    told = whole_text(decode, before)
    text = whole_text(decode, before + visible)
    return text[len(told) :].removeprefix(decode(before)[len(told) :])


def whole_text(decode: Decode, token_ids: Sequence[int]) -> str:
    """Without an unfinished character at its end."""
    text = decode(token_ids)
    if not text.endswith(UNFINISHED):
        return text
    # The bytes of the last character may have tokens of their own, and may spoil those before them.
    shorter = (decode(token_ids[:-num_dropped]) for num_dropped in range(1, MAX_CHARACTER_BYTES))
    candidates = (without_unfinished_end(text), *shorter)
    clean = [candidate for candidate in candidates if not candidate.endswith(UNFINISHED)]
    return max(clean, key=len, default=candidates[0])


def texts_alone(
    decode: Decode, decode_one: Callable[[int], str], special_ids: Collection[int], token_ids: Sequence[int]
) -> list[str]:
    """Each token's text by itself. A character that several tokens spell stands at the last of them."""
    detokenizer = Detokenizer(decode, special_ids, ())
    texts = []
    for token_id in token_ids:
        completed = detokenizer.push(token_id)
        alone = decode_one(token_id)
        texts.append(completed.replace(UNFINISHED, "") if UNFINISHED in alone else alone)
    return texts


def without_unfinished_end(text: str) -> str:
    """Decoders write one mark for the bytes of an unfinished character, or one for each: at most three."""
    for _ in range(MAX_CHARACTER_BYTES - 1):
        text = text.removesuffix(UNFINISHED)
    return text
