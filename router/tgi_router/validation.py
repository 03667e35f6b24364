"""A draft of what a route was asked, the tokenizer and the limits -> Requests, or a ValidationError.

The rules are checked in the contract's order, because a body that breaks two of them must name the first;
whatever needs the tokenizer comes last.
"""

import math
import random
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

from tgi_router import request_id
from tgi_router.errors import ValidationError
from tgi_router.grammar.compile import GrammarCompiler
from tgi_router.grammar.mask import Grammar
from tgi_router.grammar.source import AskedGrammar, GrammarError
from tgi_router.request import Request, Sampling
from tgi_router.schemas.numbers import to_float32
from tgi_router.text.tokenizer import Encoded, Tokenizer
from tgi_router.tracing import Tracing

# TGI gave the shards at most this many tokens at a time: a larger max_new_tokens is fine if this many fit.
MAX_CHECKED_NEW_TOKENS = 1024

MAX_LOGIT_BIAS = 100.0

# An image in a prompt, as TGI writes it; to a model of texts alone it is text.
IMAGE = re.compile(r"!\[\]\([^)]*\)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What a route understood of a body; None where the client said nothing. Nothing is checked yet."""

    inputs: str
    add_special_tokens: bool
    prompt_token_ids: tuple[int, ...] | None = None  # instead of `inputs`, as they are
    num_choices: int = 1  # answers to give
    best_of: int = 1  # answers to generate, if more: the best are given
    one_seed_for_all: bool = False  # OpenAI: `seed` may go with several answers
    do_sample: bool = False
    is_greedy: bool = False  # whatever else asks for sampling: OpenAI's temperature 0
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    output_frequency_penalty: float | None = None
    output_presence_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    min_p: float | None = None
    logit_bias: Mapping[int, float] | None = None
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    trim_stop: bool = False
    shown_special: frozenset[str] = frozenset()
    ignore_eos: bool = False
    truncate: int | None = None
    watermark: bool = False
    prompt_logprobs: bool = False  # if the server gives them
    needs_prompt_logprobs: bool = False  # refused if it does not
    seed: int | None = None
    top_n_tokens: int | None = None
    top_n_field: str = "top_n_tokens"  # what the route calls it
    grammar: AskedGrammar | None = None

    @property
    def num_sequences(self) -> int:
        return max(self.best_of, self.num_choices, 1)


@dataclass(frozen=True, slots=True)
class Limits:
    max_best_of: int
    max_stop_sequences: int
    max_top_n_tokens: int
    max_input_tokens: int
    max_total_tokens: int
    vocab_size: int
    prompt_logprobs: bool  # whether the server gives them at all
    max_choices: int = 128  # answers to one request: OpenAI's `n`
    has_encoder: bool = False  # that reads prompts, which then have no logprobs
    takes_images: bool = False  # the model does; this server does not yet


class Validator:
    def __init__(
        self,
        tokenizer: Tokenizer,
        limits: Limits,
        grammars: GrammarCompiler | None = None,  # None: they are refused
        draw_seed: Callable[[], int] = lambda: random.getrandbits(64),
        tracing: Tracing | None = None,
    ) -> None:
        self.limits = limits
        self._grammars = grammars
        self._tokenizer = tokenizer
        self._draw_seed = draw_seed
        self._tracing = tracing

    def check_choices(self, draft: Draft) -> None:
        """Before anything is reserved."""
        if not 1 <= draft.num_choices <= self.limits.max_choices:
            raise ValidationError(
                f"`n` must be >= 1 and <= {self.limits.max_choices}. Given: {draft.num_choices}"
            )

    def check_best_of(self, draft: Draft) -> None:
        """Before anything is reserved for an answer that comes in one piece."""
        if draft.best_of > 1 and self.limits.max_best_of == 1:
            raise ValidationError("`best_of` != 1 is not allowed for this endpoint")
        if draft.best_of > max(self.limits.max_best_of, 1):
            raise ValidationError(
                f"`best_of` must be > 0 and <= {self.limits.max_best_of}. Given: {draft.best_of}"
            )

    def check_stream(self, draft: Draft) -> None:
        """Before anything is reserved for a stream."""
        if draft.best_of != 1:
            raise ValidationError("`best_of` != 1 is not supported when streaming tokens")
        if draft.prompt_logprobs:
            raise ValidationError("`decoder_input_details` == true is not supported when streaming tokens")

    async def validate(self, draft: Draft) -> list[Request]:
        """One request for each of the draft's sequences. Raises ValidationError."""
        sampling = self._sampling(draft)
        self._check_parameters(draft)
        prompt, prompt_token_ids = draft.inputs, await self._prompt(draft)
        if draft.prompt_token_ids is not None:
            prompt = self._tokenizer.decode(prompt_token_ids)
        max_new_tokens = self._max_new_tokens(draft, len(prompt_token_ids))
        grammar = await self._grammar(draft)
        own_id = request_id.current()
        return [
            Request(
                request_id=own_id,
                prompt=prompt,
                prompt_token_ids=prompt_token_ids,
                sampling=sampling(draft.seed if draft.seed is not None else self._draw_seed()),
                max_new_tokens=max_new_tokens,
                stop=draft.stop,
                trim_stop=draft.trim_stop,
                shown_special=draft.shown_special,
                ignore_eos=draft.ignore_eos,
                top_n_tokens=draft.top_n_tokens or 0,
                prompt_logprobs=(
                    draft.needs_prompt_logprobs or (draft.prompt_logprobs and self.limits.prompt_logprobs)
                ),
                continues_prompt=not self.limits.has_encoder,
                grammar=grammar,
                choice=choice,
            )
            for choice in range(draft.num_sequences)
        ]

    def _sampling(self, draft: Draft) -> Callable[[int], Sampling]:
        """Rules 1 to 7 (what chooses the next token). The result makes the parameters with a seed."""
        asks_for_sampling = draft.do_sample or any(
            value is not None for value in (draft.temperature, draft.top_k, draft.top_p, draft.typical_p)
        )
        if draft.best_of > 1 and not asks_for_sampling and not draft.is_greedy:
            raise ValidationError("you must use sampling when `best_of` is > 1")
        temperature = _float32("temperature", draft.temperature, 1.0)
        if temperature <= 0:
            raise ValidationError("`temperature` must be strictly positive")
        repetition_penalty = _float32("repetition_penalty", draft.repetition_penalty, 1.0)
        if repetition_penalty <= 0:
            raise ValidationError("`repetition_penalty` must be strictly positive")
        penalties = {}
        for field, value in (
            ("frequency_penalty", draft.frequency_penalty),
            ("output_frequency_penalty", draft.output_frequency_penalty),
            ("output_presence_penalty", draft.output_presence_penalty),
        ):
            name = field.removeprefix("output_")  # what its route calls it
            penalties[field] = _float32(name, value, 0.0)
            if not -2 <= penalties[field] <= 2:
                raise ValidationError(f"`{name}` must be >= -2.0 and <= 2.0")
        top_p = _float32("top_p", draft.top_p, 1.0)
        if draft.top_p is not None and not 0 < top_p < 1:
            raise ValidationError("`top_p` must be > 0.0 and < 1.0")
        typical_p = _float32("typical_p", draft.typical_p, 1.0)
        if draft.typical_p is not None and not 0 < typical_p < 1:
            raise ValidationError("`typical_p` must be > 0.0 and < 1.0")
        if draft.top_k is not None and draft.top_k <= 0:
            raise ValidationError("`top_k` must be strictly positive")
        min_p = _float32("min_p", draft.min_p, 0.0)
        if not 0 <= min_p <= 1:
            raise ValidationError("`min_p` must be >= 0.0 and <= 1.0")
        logit_bias = self._logit_bias(draft)
        # `temperature: 1` alone stays greedy, although it counts as asking for sampling above.
        samples = draft.do_sample or temperature != 1 or bool(draft.top_k) or top_p < 1 or typical_p < 1

        def with_seed(seed: int) -> Sampling:
            return Sampling(
                do_sample=samples and not draft.is_greedy,
                temperature=temperature,
                top_k=draft.top_k or 0,
                top_p=top_p,
                typical_p=typical_p,
                repetition_penalty=repetition_penalty,
                frequency_penalty=penalties["frequency_penalty"],
                output_frequency_penalty=penalties["output_frequency_penalty"],
                output_presence_penalty=penalties["output_presence_penalty"],
                watermark=draft.watermark,
                min_p=min_p,
                logit_bias=logit_bias,
                seed=seed,
            )

        return with_seed

    def _logit_bias(self, draft: Draft) -> tuple[tuple[int, float], ...]:
        logit_bias = draft.logit_bias or {}
        for token_id, value in logit_bias.items():
            if not 0 <= token_id < self.limits.vocab_size:
                raise ValidationError(
                    f"`logit_bias` names token id {token_id}, which is not in the model's vocabulary "
                    f"of {self.limits.vocab_size}"
                )
            if not -MAX_LOGIT_BIAS <= value <= MAX_LOGIT_BIAS:
                raise ValidationError(
                    f"`logit_bias` must be >= {-MAX_LOGIT_BIAS} and <= {MAX_LOGIT_BIAS}. "
                    f"Given: {value} for token id {token_id}"
                )
        return tuple(logit_bias.items())

    def _check_parameters(self, draft: Draft) -> None:
        """Rules 8 to 13."""
        limits = self.limits
        if draft.max_new_tokens == 0:
            raise ValidationError("`max_new_tokens` must be strictly positive")
        if len(draft.stop) > limits.max_stop_sequences:
            raise ValidationError(
                f"`stop` supports up to {limits.max_stop_sequences} stop sequences. Given: {len(draft.stop)}"
            )
        if draft.seed is not None and draft.best_of > 1 and not draft.one_seed_for_all:
            raise ValidationError("`seed` must not be set when `best_of` > 1")
        if (draft.top_n_tokens or 0) > limits.max_top_n_tokens:
            raise ValidationError(
                f"`{draft.top_n_field}` must be >= 0 and <= {limits.max_top_n_tokens}. "
                f"Given: {draft.top_n_tokens}"
            )
        if draft.needs_prompt_logprobs and not limits.prompt_logprobs:
            raise ValidationError(
                "logprobs of the prompt need a server that was started with `--enable-prefill-logprobs`"
            )
        wants_prompt_logprobs = draft.needs_prompt_logprobs or draft.prompt_logprobs
        if wants_prompt_logprobs and limits.prompt_logprobs and limits.has_encoder:
            raise ValidationError(
                "logprobs of the prompt (`decoder_input_details`) are not supported: this model reads it "
                "with an encoder, which gives it none"
            )
        if not draft.inputs and not draft.prompt_token_ids:
            raise ValidationError("`inputs` cannot be empty")
        if draft.truncate is not None and not 0 < draft.truncate <= limits.max_input_tokens:
            raise ValidationError(
                f"`truncate` must be strictly positive and less than {limits.max_input_tokens}. "
                f"Given: {draft.truncate}"
            )

    async def _prompt(self, draft: Draft) -> tuple[int, ...]:
        """Rule 14, and the cut that `truncate` asks for."""
        if draft.prompt_token_ids is not None:
            for token_id in (min(draft.prompt_token_ids), max(draft.prompt_token_ids)):
                if not 0 <= token_id < self.limits.vocab_size:
                    raise ValidationError(
                        f"token id {token_id} is not in the model's vocabulary of {self.limits.vocab_size}"
                    )
            return draft.prompt_token_ids
        if self.limits.takes_images and IMAGE.search(draft.inputs):
            raise ValidationError("images are not available yet: the prompt has one, ![](...)")
        try:
            with self._tracing.span("tokenize") if self._tracing is not None else nullcontext():
                encoded = await self._tokenizer.encode(
                    draft.inputs, add_special_tokens=draft.add_special_tokens
                )
        except Exception as error:  # the tokenizer library raises bare Exception
            raise ValidationError(f"tokenizer error {error}") from error
        if not encoded.token_ids:
            raise ValidationError("`inputs` cannot be empty")
        if (largest := max(encoded.token_ids)) >= self.limits.vocab_size:
            raise ValidationError(
                f"tokenizer error token id {largest} is not in the model's vocabulary "
                f"of {self.limits.vocab_size}"
            )
        return truncated(encoded, draft.truncate)

    async def _grammar(self, draft: Draft) -> Grammar | None:
        """Rule 17."""
        if draft.grammar is None:
            return None
        if self._grammars is None:
            raise ValidationError("grammar is not supported")
        try:
            return await self._grammars.compile(draft.grammar)
        except GrammarError as error:
            raise ValidationError(str(error)) from error

    def _max_new_tokens(self, draft: Draft, num_prompt_tokens: int) -> int:
        """Rules 15 and 16. The exact number, cut to what fits behind the prompt."""
        limits = self.limits
        room = max(limits.max_total_tokens - num_prompt_tokens, 0)
        wanted = room if draft.max_new_tokens is None else draft.max_new_tokens
        checked = min(wanted, MAX_CHECKED_NEW_TOKENS)
        if num_prompt_tokens + checked > limits.max_total_tokens:
            raise ValidationError(
                f"`inputs` tokens + `max_new_tokens` must be <= {limits.max_total_tokens}. "
                f"Given: {num_prompt_tokens} `inputs` tokens and {checked} `max_new_tokens`"
            )
        if num_prompt_tokens > limits.max_input_tokens:
            raise ValidationError(
                f"`inputs` must have less than {limits.max_input_tokens} tokens. Given: {num_prompt_tokens}"
            )
        return min(wanted, room)


def truncated(encoded: Encoded, truncate: int | None) -> tuple[int, ...]:
    """The last `truncate` ids; special tokens in front (BOS) keep their place."""
    token_ids = encoded.token_ids
    if truncate is None or len(token_ids) <= truncate:
        return tuple(token_ids)
    num_leading = min(encoded.num_leading_special, truncate - 1)
    return (*token_ids[:num_leading], *token_ids[len(token_ids) - (truncate - num_leading) :])


def _float32(name: str, value: float | None, default: float) -> float:
    """As the shards will see it: what rounds to 0 or to infinity there must not pass here."""
    if value is None:
        return default
    rounded = to_float32(value)
    if not math.isfinite(rounded):
        raise ValidationError(f"`{name}` must be a 32-bit float. Given: {value}")
    return rounded
