"""One sequence as its reader sees it: tokens become text as they come, and what ends it is found out.

A step brings a token for many sequences at once. An Answer must tell the step loop at once whether its token
was the last; what the token says goes to the reader, who looks at it later.
"""

from collections.abc import Callable, Collection
from typing import Protocol

from msgspec import Struct

from tgi_router.errors import Cancelled, GenerationFailed, RequestError, ShardsUnavailable
from tgi_router.metrics import Metrics
from tgi_router.request import FinishReason, Request, SampledToken
from tgi_router.scheduling.step_loop import ShardsGone
from tgi_router.text.detokenizer import Detokenizer, context_of, final_text
from tgi_router.text.stopping import StopAnywhere, StopAtTokenEnd
from tgi_router.text.tokenizer import Tokenizer

NUM_CONTEXT_TOKENS = 5  # of the prompt, for the text of the first tokens


class GeneratedToken(Struct, frozen=True, gc=False):
    index: int  # counts from 1
    id: int
    text: str  # what it adds, special tokens spelled out; empty while a character is unfinished
    shown: str  # the same for OpenAI's routes: no special tokens, nothing from a stop string on
    logprob: float
    special: bool
    top_tokens: tuple[tuple[int, float], ...]  # (token id, logprob), best first


class Reader(Protocol):
    """Whom an answer tells its news. Implemented by Mailbox."""

    def put(self, answer: "Answer", token: GeneratedToken | None) -> None:
        """A token; None: the answer is over, without or after its last token (see Answer.error)."""

    def tell_turn(self) -> None:
        """The answer left the queue."""


class Answer:
    """One sequence as its reader sees it. Implements Listener."""

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        eos_token_ids: Collection[int],
        reader: Reader,
        *,
        tells_tokens: bool,
        clock_ns: Callable[[], int],
        started_ns: int,
        metrics: Metrics,
    ) -> None:
        self.request = request
        self.token_ids: list[int] = []
        self.tokens: list[GeneratedToken] = []  # kept unless they are told one by one
        self.prompt_logprobs: list[float] = []
        self.finish_reason: FinishReason | None = None
        self.error: RequestError | None = None
        self.rest = ""  # what a cancelled answer still had to show
        self.sum_logprobs = 0.0
        self.scheduled_ns: int | None = None
        self.ended_ns: int | None = None
        self._started_ns = started_ns
        self._metrics = metrics
        self._last_token_ns: int | None = None
        self._clock_ns = clock_ns
        self._reader = reader
        self._tells_tokens = tells_tokens
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        # What the answer's text goes on from.
        self._prompt_token_ids = request.prompt_token_ids if request.continues_prompt else ()
        if request.trim_stop:
            # The context of the final text: what is streamed and what is answered in one piece are the same.
            context = self._context_of_whole_text()
        else:
            context = context_of(tokenizer.decode, self._prompt_token_ids, NUM_CONTEXT_TOKENS)
        self._detokenizer = Detokenizer(
            tokenizer.decode, tokenizer.special_ids, context, tokenizer.decode_byte_level
        )
        self._stop_anywhere = StopAnywhere(request.stop if request.trim_stop else ())
        self._stop_at_token_end = StopAtTokenEnd(request.stop) if request.stop else None
        # Looked at for every token.
        self._trim_stop = request.trim_stop
        self._max_new_tokens = request.max_new_tokens
        self._special_ids = tokenizer.special_ids
        self._observe_gap = metrics.tgi_inter_token_duration.observe

    @property
    def is_over(self) -> bool:
        return self.ended_ns is not None

    def ends_with(self, token: GeneratedToken) -> bool:
        """Whether this is the answer's last token."""
        return self.finish_reason is not None and token.index == len(self.token_ids)

    @property
    def is_cancelled(self) -> bool:
        return isinstance(self.error, Cancelled)

    @property
    def mean_logprob(self) -> float:
        return self.sum_logprobs / max(len(self.token_ids), 1)

    @property
    def seed(self) -> int | None:
        """As replies report it: None if nothing was drawn."""
        return self.request.sampling.seed if self.request.sampling.do_sample else None

    def generated_text(self) -> str:
        """All of the answer; for OpenAI's routes what was shown, for TGI's own also the stop string."""
        if self.request.trim_stop:
            return "".join(token.shown for token in self.tokens) + self.rest
        return final_text(
            self._tokenizer.decode,
            self._tokenizer.special_ids,
            self._context_of_whole_text(),
            self.token_ids,
        )

    def _context_of_whole_text(self) -> list[int]:
        context = context_of(self._tokenizer.decode, self._prompt_token_ids, 1)
        return [token_id for token_id in context if token_id not in self._tokenizer.special_ids]

    def on_scheduled(self) -> None:
        self.scheduled_ns = self._clock_ns()
        self._reader.tell_turn()

    def on_prompt_logprobs(self, start_position: int, logprobs: list[float]) -> None:
        self.prompt_logprobs.extend(logprobs)

    def on_token(self, token: SampledToken) -> FinishReason | None:
        now_ns = self._clock_ns()
        if self._last_token_ns is None:
            self._metrics.tgi_time_to_first_token_duration.observe((now_ns - self._started_ns) / 1e9)
        else:
            self._observe_gap((now_ns - self._last_token_ns) / 1e9)
        self._last_token_ns = now_ns
        token_id = token.token_id
        self.token_ids.append(token_id)
        index = len(self.token_ids)
        self.sum_logprobs += token.logprob
        special = token_id in self._special_ids
        text = self._detokenizer.push(token_id)
        reason: FinishReason | None = None
        if index >= self._max_new_tokens:
            reason = "length"
            text += self._detokenizer.flush()
        elif token.ends_grammar or (token_id in self._eos_token_ids and not self.request.ignore_eos):
            reason = "eos_token"
        if self._trim_stop and not special and not self.request.stop:
            shown = text  # nothing is looked for, nothing held back
        elif self._trim_stop:
            shown, is_stop = self._show(text, special)
            if is_stop:
                reason = "stop_sequence"
            elif reason is not None:
                shown += self._stop_anywhere.flush()
        else:
            shown = ""
            stop = self._stop_at_token_end
            if stop is not None and reason is None and stop.push(text):
                reason = "stop_sequence"
        generated = GeneratedToken(index, token_id, text, shown, token.logprob, special, token.top_tokens)
        if reason is not None:
            self.finish_reason = reason
            self.ended_ns = self._clock_ns()
        if self._tells_tokens:
            self._reader.put(self, generated)
        else:
            self.tokens.append(generated)
            if reason is not None:
                self._reader.put(self, None)
        return reason

    def on_error(self, error: Exception) -> None:
        wrapped = ShardsUnavailable(error) if isinstance(error, ShardsGone) else GenerationFailed(error)
        wrapped.__cause__ = error
        self.fail(wrapped)

    def fail(self, error: RequestError) -> None:
        """End here. The step loop must not call any more."""
        self.error = error
        self.ended_ns = self._clock_ns()
        self._reader.put(self, None)

    def cancel(self) -> None:
        """End here. The step loop must not call any more."""
        if self.request.trim_stop:
            shown, _ = self._stop_anywhere.push(self._detokenizer.flush())
            self.rest = shown + self._stop_anywhere.flush()
        self.error = Cancelled()
        self.ended_ns = self._clock_ns()
        self._reader.put(self, None)

    def _show(self, text: str, special: bool) -> tuple[str, bool]:
        if not special or text.strip() in self.request.shown_special:
            return self._stop_anywhere.push(text)
        if self._stop_anywhere.would_end_with(text):
            return "", True
        return "", False
