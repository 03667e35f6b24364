"""What a client asked for -> a Grammar: away from the event loop, within caps on time and size, remembered.

A grammar is tried in a process that can be killed (sentry.py) before a thread compiles it for the tokenizer.
"""

import asyncio
import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import structlog
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from tgi_router.errors import Overloaded
from tgi_router.grammar.mask import Grammar, Vocabulary
from tgi_router.grammar.sentry import LIMITS, MAX_CHECK_S, TOO_SLOW, CheckFailed, Sentry
from tgi_router.grammar.source import AskedGrammar, GrammarError, Source, source_of

MAX_COMPILE_S = MAX_CHECK_S
MAX_WAIT_S = 10.0  # with the check; others' grammars may come before
RETRY_AFTER_S = 2  # what is told to who waited for that long
NUM_THREADS = 2
NUM_REMEMBERED = 64
MAX_MESSAGE_CHARACTERS = 500
END_TOKEN = "<|end of grammar|>"  # for a model that has none; never a token of an answer

log = structlog.get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class GrammarCompiler:
    """tokenizer_json: as in tokenizer.json. vocab_size: of the model, whose scores the masks are for."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar-compiler")
        self._sentry = Sentry()
        self._remembered: OrderedDict[Source, Grammar] = OrderedDict()  # the most recently used last
        # Takes a second for a large vocabulary; whoever needs it first waits for it.
        self._tokenizer = self._threads.submit(_load, tokenizer_json, vocab_size, frozenset(eos_token_ids))

    async def ready(self) -> None:
        """The tokenizer has been read, the sentry's processes run: nothing of this object holds the GIL for
        long from now on.
        """
        await self._sentry.start()
        with contextlib.suppress(ValueError):  # told in the log, and to every client that asks for a grammar
            await asyncio.wrap_future(self._tokenizer)

    async def compile(self, asked: AskedGrammar) -> Grammar:
        """Raises GrammarError, Overloaded."""
        try:
            tokenizer, vocabulary = await asyncio.wrap_future(self._tokenizer)
        except ValueError as error:
            raise GrammarError("grammar is not supported: the model's tokenizer has no bytes") from error
        source = await self._in_time(source_of, asked)
        if (grammar := self._remembered.get(source)) is None:
            text = source.grammar()
            await self._try(text)
            grammar = await self._in_time(_build, text, tokenizer, vocabulary)
        self._remember(source, grammar)
        return grammar

    async def _try(self, text: str) -> None:
        """To wait for a process says nothing about the grammar; what a process takes for it does."""
        try:
            async with asyncio.timeout(MAX_WAIT_S):
                problem = await self._sentry.check(text)
        except TimeoutError as error:
            raise Overloaded(RETRY_AFTER_S) from error
        except CheckFailed as error:
            raise GrammarError.invalid(str(error)) from error
        if problem:
            raise invalid(problem)

    async def _in_time(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """In a thread. Raises GrammarError, and what the function raises."""
        call = functools.partial(function, *args, **kwargs)
        try:
            async with asyncio.timeout(MAX_COMPILE_S):
                return await asyncio.get_running_loop().run_in_executor(self._threads, call)
        except TimeoutError as error:
            raise GrammarError.invalid(TOO_SLOW) from error

    def _remember(self, source: Source, grammar: Grammar) -> None:
        self._remembered[source] = grammar
        self._remembered.move_to_end(source)
        while len(self._remembered) > NUM_REMEMBERED:
            self._remembered.popitem(last=False)

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._sentry.close()


def invalid(problem: str) -> GrammarError:
    text = problem.replace("<non-verbose/>", "").strip()
    return GrammarError.invalid(text[:MAX_MESSAGE_CHARACTERS])


def _load(
    tokenizer_json: str, vocab_size: int, eos_token_ids: frozenset[int]
) -> tuple[LLTokenizer, Vocabulary]:
    """Raises ValueError for a tokenizer that is neither byte-level nor falls back to bytes."""
    tokenizer = FastTokenizer.from_str(tokenizer_json)
    known_eos = sorted(token_id for token_id in eos_token_ids if token_id < tokenizer.get_vocab_size())
    pretended = None
    if not known_eos:
        tokenizer.add_special_tokens([AddedToken(END_TOKEN, special=True, normalized=False)])
        pretended = tokenizer.get_vocab_size() - 1
        assert tokenizer.id_to_token(pretended) == END_TOKEN
        tokenizer_json, known_eos = tokenizer.to_str(), [pretended]
    num_tokens = max(vocab_size, tokenizer.get_vocab_size())
    try:
        matching = LLTokenizer(tokenizer_json, n_vocab=num_tokens, eos_token=known_eos)
    except ValueError as error:
        log.warning(f"Grammars are not supported with this model's tokenizer: {error}")
        raise
    return matching, Vocabulary(
        mask_bytes=-(-vocab_size // 32) * 4,
        matcher_mask_bytes=-(-num_tokens // 32) * 4,
        eos_token_ids=frozenset(known_eos),
        pretended_eos_id=pretended,
    )


def _build(text: str, tokenizer: LLTokenizer, vocabulary: Vocabulary) -> Grammar:
    """Raises GrammarError."""
    matcher = LLMatcher(tokenizer, text, limits=LIMITS, log_level=0)
    if matcher.is_error():
        raise invalid(matcher.get_error())
    first = matcher.deep_copy()
    first.compute_bitmask()
    if first.is_error():
        problem = first.get_error()
        raise invalid("no text matches it" if problem.startswith("NoExtension") else problem)
    return Grammar(matcher, vocabulary)
