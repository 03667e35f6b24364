"""What a client asked for -> a Grammar: away from the event loop, within caps on time and size, remembered.

A grammar is tried in a process that can be killed (sentry.py) before a thread compiles it for the tokenizer.
"""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

import structlog
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from tgi_router.grammar.mask import Grammar, Vocabulary
from tgi_router.grammar.sentry import LIMITS, MAX_CHECK_S, CheckFailed, Sentry
from tgi_router.grammar.source import AskedGrammar, GrammarError, Source, source_of

MAX_COMPILE_S = MAX_CHECK_S
NUM_THREADS = 2
NUM_REMEMBERED = 64
MAX_MESSAGE_CHARACTERS = 500
END_TOKEN = "<|end of grammar|>"  # for a model that has none; never a token of an answer

log = structlog.get_logger(__name__)


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
        """Raises GrammarError."""
        loop = asyncio.get_running_loop()
        try:
            tokenizer, vocabulary = await asyncio.wrap_future(self._tokenizer)
        except ValueError as error:
            raise GrammarError("grammar is not supported: the model's tokenizer has no bytes") from error
        try:
            async with asyncio.timeout(MAX_COMPILE_S):
                source = await loop.run_in_executor(self._threads, source_of, asked)
                if (grammar := self._remembered.get(source)) is None:
                    text = source.grammar()
                    if problem := await self._sentry.check(text):
                        raise invalid(problem)
                    grammar = await loop.run_in_executor(self._threads, _build, text, tokenizer, vocabulary)
        except TimeoutError as error:
            raise GrammarError.invalid(f"it does not compile within {MAX_COMPILE_S:g} s") from error
        except CheckFailed as error:
            raise GrammarError.invalid("it takes too much memory to compile") from error
        self._remember(source, grammar)
        return grammar

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
