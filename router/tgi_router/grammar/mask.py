"""A grammar at work: which tokens may come next, and on with the one that came.

The state of a matcher is a function of the output tokens. It lives beside the sequence, so it survives what
the router survives: a preemption, a lost shard.
"""

import asyncio
import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from llguidance import LLExecutor, LLMatcher


class GrammarBroken(Exception):
    """A matcher cannot go on; the text is for its client."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens that masks speak of."""

    mask_bytes: int  # of a mask on the wire: a bit for each token of the model, in whole 32-bit words
    matcher_mask_bytes: (
        int  # of a mask as the matcher writes it: tokens that the model lacks come after those
    )
    eos_token_ids: frozenset[int]
    # The end that the matcher speaks of where the model has none of its own: never a token of an answer.
    pretended_eos_id: int | None


class Grammar:
    """A compiled grammar, at its start. Shared by all answers that must match it."""

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def matcher(self) -> "Matcher":
        return Matcher(self._matcher.deep_copy(), self._vocabulary)


class Matcher:
    """Where one answer stands in its grammar. One thread at a time."""

    __slots__ = ("_has_ended", "_vocabulary", "engine")

    def __init__(self, engine: LLMatcher, vocabulary: Vocabulary) -> None:
        self.engine = engine
        self._vocabulary = vocabulary
        self._has_ended = False  # the model has said so

    def advance(self, token_id: int) -> bool:
        """Take the next token. True: nothing may follow, and no token of the model would say so.

        Raises GrammarBroken.
        """
        if self._has_ended:  # the client ignores ends: nothing but more of them can follow
            return False
        if not self.engine.consume_token(token_id):
            raise GrammarBroken(f"token {token_id} does not match the grammar")
        self._has_ended = token_id in self._vocabulary.eos_token_ids
        return self._vocabulary.pretended_eos_id is not None and self.engine.is_stopped()

    def mask_of(self, written: memoryview) -> bytes:
        """What the engine has written for this matcher, as the shards want it. Raises GrammarBroken."""
        if self.engine.is_error():
            raise GrammarBroken(f"the grammar cannot go on: {_first_line(self.engine.get_error())}")
        mask = bytearray(written[: self._vocabulary.mask_bytes])
        pretended = self._vocabulary.pretended_eos_id
        if pretended is not None and pretended // 8 < len(mask):
            mask[pretended // 8] &= ~(1 << pretended % 8)
        if mask.count(0) == len(mask):
            raise GrammarBroken("no token of the model can follow in the grammar")
        return bytes(mask)

    @property
    def written_bytes(self) -> int:
        return self._vocabulary.matcher_mask_bytes


def compute_masks(matchers: Sequence[Matcher], executor: LLExecutor) -> list[bytes | GrammarBroken]:
    """The tokens that may come next, for each matcher (of one vocabulary). Without the GIL, in parallel."""
    row_bytes = matchers[0].written_bytes
    buffer = bytearray(row_bytes * len(matchers))
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    rows = [(matcher.engine, row) for row, matcher in enumerate(matchers)]
    executor.unsafe_compute_mask_ptr(rows, address, row_bytes, len(matchers))
    view = memoryview(buffer)
    masks: list[bytes | GrammarBroken] = []
    for row, matcher in enumerate(matchers):
        try:
            masks.append(matcher.mask_of(view[row * row_bytes : (row + 1) * row_bytes]))
        except GrammarBroken as error:
            masks.append(error)
    return masks


class MaskWorker:
    """Computes masks away from the event loop, one step after the other.

    One thread: a matcher is never in use twice at a time, not even when a step is given up while its masks
    are being computed and its sequences start over. Within a step the rows are computed in parallel.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-masks")
        self._executor: LLExecutor | None = None

    def begin(
        self, matchers: Sequence[Matcher], on_done: Callable[[], None]
    ) -> "asyncio.Future[list[bytes | GrammarBroken]]":
        """`on_done` is called on the event loop."""
        future = asyncio.get_running_loop().run_in_executor(self._thread, self._compute, list(matchers))
        future.add_done_callback(lambda _: on_done())
        return future

    def _compute(self, matchers: list[Matcher]) -> list[bytes | GrammarBroken]:
        if not matchers:
            return []
        if self._executor is None:
            self._executor = LLExecutor()
        return compute_masks(matchers, self._executor)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
