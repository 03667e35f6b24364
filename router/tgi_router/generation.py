"""Request -> stream of tokens -> reply: the reading end of the sequences that the step loop runs.

    begin(draft) -> Run -> its Answers, one for each choice -> what they tell arrives in a Mailbox

A step brings a token for many sequences at once. Each Answer turns its token into text as it comes (it must
tell the step loop whether that was the last) and drops it into its reader's mailbox; the reader is woken
once and takes all that has piled up since.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Protocol

import structlog
from msgspec import Struct

from tgi_router.errors import (
    Cancelled,
    ClientGone,
    GenerationFailed,
    QueuedTooLong,
    RequestError,
    ShardsUnavailable,
    ShuttingDown,
    UnknownRequest,
)
from tgi_router.metrics import Metrics
from tgi_router.permits import Permits
from tgi_router.request import FinishReason, Listener, Request, SampledToken
from tgi_router.scheduling.step_loop import ShardsGone
from tgi_router.text.detokenizer import Detokenizer, context_of, final_text
from tgi_router.text.stopping import StopAnywhere, StopAtTokenEnd
from tgi_router.text.tokenizer import Tokenizer
from tgi_router.tracing import GenerationTrace, Tracing
from tgi_router.validation import Draft, Validator

MAX_UNREAD = 10_000  # news in a mailbox: minutes of one stream, a few seconds of 128 choices
NUM_CONTEXT_TOKENS = 5  # of the prompt, for the text of the first tokens

log = structlog.get_logger(__name__)


class Steps(Protocol):
    """What this room needs of the step loop."""

    def submit(self, request: Request, listener: Listener) -> int: ...
    def cancel(self, sequence_id: int) -> None: ...
    async def drain(self) -> None: ...


class GeneratedToken(Struct, frozen=True, gc=False):
    index: int  # counts from 1
    id: int
    text: str  # what it adds, special tokens spelled out; empty while a character is unfinished
    shown: str  # the same for OpenAI's routes: no special tokens, nothing from a stop string on
    logprob: float
    special: bool
    top_tokens: tuple[tuple[int, float], ...]  # (token id, logprob), best first


class Mailbox:
    """Where answers leave their news for one reader.

    A reader that leaves too much of it unread (because its client does not read) has gone, as if the client
    had closed the connection.
    """

    __slots__ = ("_awaits_turn", "_news", "_waiter", "is_closed", "on_overflow")

    def __init__(self) -> None:
        self._news: list[tuple[Answer, GeneratedToken | None]] = []
        self._waiter: asyncio.Future[None] | None = None
        self._awaits_turn = False
        self.is_closed = False
        self.on_overflow: list[Callable[[], None]] = []

    def put(self, answer: "Answer", token: "GeneratedToken | None") -> None:
        """A token; None: the answer is over, without or after its last token (see Answer.error)."""
        self._news.append((answer, token))
        self.wake()
        if len(self._news) > MAX_UNREAD:
            self.close()
            for end in self.on_overflow:
                end()

    @property
    def has_news(self) -> bool:
        return bool(self._news)

    def wake(self) -> None:
        """The reader looks up, also if there is nothing."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        """The client is gone: the reader gets ClientGone."""
        self.is_closed = True
        self._news.clear()
        self.wake()

    async def take(self) -> "list[tuple[Answer, GeneratedToken | None]]":
        """All that came since the last time; empty after a wake() for another reason. Raises ClientGone."""
        if not self._news and not self.is_closed:
            await self._woken()
        if self.is_closed:
            raise ClientGone
        news, self._news = self._news, []
        return news

    def tell_turn(self) -> None:
        """An answer left the queue: this wakes nobody but who waits for that."""
        if self._awaits_turn:
            self.wake()

    async def turn(self, has_come: Callable[[], bool]) -> None:
        """Until it has; the news stay. Raises ClientGone."""
        self._awaits_turn = True
        while not self.is_closed and not has_come():
            await self._woken()
        self._awaits_turn = False
        if self.is_closed:
            raise ClientGone

    async def _woken(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


class Answer:
    """One sequence as its reader sees it. Implements Listener."""

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        eos_token_ids: Collection[int],
        mailbox: Mailbox,
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
        self._mailbox = mailbox
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
        self._detokenizer = Detokenizer(tokenizer.decode, tokenizer.special_ids, context)
        self._stop_anywhere = StopAnywhere(request.stop if request.trim_stop else ())
        self._stop_at_token_end = StopAtTokenEnd(() if request.trim_stop else request.stop)

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
        self._mailbox.tell_turn()

    def on_prompt_logprobs(self, start_position: int, logprobs: list[float]) -> None:
        self.prompt_logprobs.extend(logprobs)

    def on_token(self, token: SampledToken) -> FinishReason | None:
        now_ns = self._clock_ns()
        if self._last_token_ns is None:
            self._metrics.tgi_time_to_first_token_duration.observe((now_ns - self._started_ns) / 1e9)
        else:
            self._metrics.tgi_inter_token_duration.observe((now_ns - self._last_token_ns) / 1e9)
        self._last_token_ns = now_ns
        token_id = token.token_id
        self.token_ids.append(token_id)
        self.sum_logprobs += token.logprob
        special = token_id in self._tokenizer.special_ids
        text = self._detokenizer.push(token_id)
        reason: FinishReason | None = None
        if len(self.token_ids) >= self.request.max_new_tokens:
            reason = "length"
            text += self._detokenizer.flush()
        elif token.ends_grammar or (token_id in self._eos_token_ids and not self.request.ignore_eos):
            reason = "eos_token"
        if self.request.trim_stop:
            shown, is_stop = self._show(text, special)
            if is_stop:
                reason = "stop_sequence"
            elif reason is not None:
                shown += self._stop_anywhere.flush()
        else:
            shown = ""
            if reason is None and self._stop_at_token_end.push(text):
                reason = "stop_sequence"
        generated = GeneratedToken(
            len(self.token_ids), token_id, text, shown, token.logprob, special, token.top_tokens
        )
        if reason is not None:
            self.finish_reason = reason
            self.ended_ns = self._clock_ns()
        if self._tells_tokens:
            self._mailbox.put(self, generated)
        else:
            self.tokens.append(generated)
            if reason is not None:
                self._mailbox.put(self, None)
        return reason

    def on_error(self, error: Exception) -> None:
        wrapped = ShardsUnavailable(error) if isinstance(error, ShardsGone) else GenerationFailed(error)
        wrapped.__cause__ = error
        self.fail(wrapped)

    def fail(self, error: RequestError) -> None:
        """End here. The step loop must not call any more."""
        self.error = error
        self.ended_ns = self._clock_ns()
        self._mailbox.put(self, None)

    def cancel(self) -> None:
        """End here. The step loop must not call any more."""
        if self.request.trim_stop:
            shown, _ = self._stop_anywhere.push(self._detokenizer.flush())
            self.rest = shown + self._stop_anywhere.flush()
        self.error = Cancelled()
        self.ended_ns = self._clock_ns()
        self._mailbox.put(self, None)

    def _show(self, text: str, special: bool) -> tuple[str, bool]:
        if not special or text.strip() in self.request.shown_special:
            return self._stop_anywhere.push(text)
        if self._stop_anywhere.would_end_with(text):
            return "", True
        return "", False


class Timings(Struct, frozen=True):
    """Nanoseconds of one answer's way."""

    total: int
    validation: int  # from the handler's start until it was queued
    queue: int  # until it was first scheduled
    inference: int  # from then to the end

    def per_token(self, num_tokens: int) -> int:
        return self.inference // max(num_tokens, 1)


class Run:
    """One draft under way. Whoever began it closes it, however it ends."""

    def __init__(
        self,
        generation: "Generation",
        answers: list[Answer],
        mailbox: Mailbox,
        *,
        started_ns: int,
        queued_ns: int,
        route: str,
        num_choices: int,
        trace: GenerationTrace | None,
    ) -> None:
        self._trace = trace
        self.answers = answers
        self.route = route
        self._num_choices = num_choices
        self._generation = generation
        self._mailbox = mailbox
        self._started_ns = started_ns
        self._queued_ns = queued_ns
        self._sequence_ids: dict[Answer, int] = {}
        self._is_open = True
        self.queue_timer: asyncio.TimerHandle | None = None  # shared by the runs of a request

    @property
    def best(self) -> Answer:
        """Highest mean logprob; the earliest of equals."""
        return max(self.answers, key=lambda answer: answer.mean_logprob)

    @property
    def request_id(self) -> str:
        return self.answers[0].request.request_id

    @property
    def chosen(self) -> list[Answer]:
        """The answers that are given: all, or the best of more, best first."""
        if len(self.answers) == self._num_choices:
            return self.answers
        ranked = sorted(self.answers, key=lambda answer: answer.mean_logprob, reverse=True)
        return ranked[: self._num_choices]

    @property
    def error(self) -> RequestError | None:
        return next((answer.error for answer in self.answers if answer.error is not None), None)

    @property
    def has_failed(self) -> bool:
        return any(answer.error is not None and not answer.is_cancelled for answer in self.answers)

    @property
    def is_over(self) -> bool:
        return all(answer.is_over for answer in self.answers)

    @property
    def has_left_queue(self) -> bool:
        """One of its sequences was scheduled; the others may wait as long as it takes."""
        return any(answer.scheduled_ns is not None for answer in self.answers)

    def timings(self, answer: Answer) -> Timings:
        """Of an answer that is over."""
        assert answer.ended_ns is not None
        scheduled_ns = answer.scheduled_ns or answer.ended_ns
        return Timings(
            answer.ended_ns - self._started_ns,
            self._queued_ns - self._started_ns,
            scheduled_ns - self._queued_ns,
            answer.ended_ns - scheduled_ns,
        )

    def close(self) -> None:
        """Give the permits back, drop what still runs, and record how it went. Once; again does nothing."""
        if not self._is_open:
            return
        self._is_open = False
        if self.queue_timer is not None:
            self.queue_timer.cancel()
        generation = self._generation
        generation.forget(self)
        generation.permits.give_back(len(self.answers))
        generation.permits.observe((generation.clock_ns() - self._queued_ns) / 1e9)
        for answer, sequence_id in self._sequence_ids.items():
            if not answer.is_over:
                generation.steps.cancel(sequence_id)
        if self._trace is not None:
            self._end_trace(self._trace)
        if self.is_over:
            if self.error is None:
                generation.record_success(self)
        elif self._mailbox.is_closed:
            generation.metrics.tgi_request_failure.labels("dropped").inc()
            log.info("Client is gone", route=self.route, request_id=self.request_id)

    def _end_trace(self, trace: GenerationTrace) -> None:
        now_ns = self._generation.clock_ns()
        for answer in self.answers:
            ended_ns = answer.ended_ns or now_ns
            scheduled_ns = answer.scheduled_ns or ended_ns
            trace.record("queued", self._queued_ns, scheduled_ns)
            if answer.scheduled_ns is not None:
                trace.record("infer", scheduled_ns, ended_ns)
        if self.error is not None:
            trace.fail(str(self.error))
        elif not self.is_over:
            trace.fail("the client is gone")
        else:
            timings = self.timings(self.best)
            trace.describe(
                {
                    "total_time": duration_text(timings.total),
                    "validation_time": duration_text(timings.validation),
                    "queue_time": duration_text(timings.queue),
                    "inference_time": duration_text(timings.inference),
                    "time_per_token": duration_text(timings.per_token(len(self.best.token_ids))),
                    "seed": str(self.best.seed),
                    "parameters": repr(self.best.request.sampling),
                }
            )
        trace.end(now_ns)

    def cancel(self) -> None:
        """End the answers that are not over: their readers get what there is."""
        self._generation.metrics.tgi_request_failure.labels("dropped").inc()
        log.info("Cancelled", route=self.route, request_id=self.request_id)
        for answer, sequence_id in self._sequence_ids.items():
            if not answer.is_over:
                self._generation.steps.cancel(sequence_id)
                answer.cancel()

    def fail(self, error: RequestError) -> None:
        """End the answers that are not over with an error."""
        for answer, sequence_id in self._sequence_ids.items():
            if not answer.is_over:
                self._generation.steps.cancel(sequence_id)
                answer.fail(error)

    def submit(self) -> None:
        for answer in self.answers:
            self._sequence_ids[answer] = self._generation.steps.submit(answer.request, answer)


class Generation:
    def __init__(
        self,
        steps: Steps,
        validator: Validator,
        tokenizer: Tokenizer,
        metrics: Metrics,
        *,
        eos_token_ids: Collection[int],
        max_concurrent_requests: int,
        max_queue_time_s: float | None = None,
        clock_ns: Callable[[], int] = time.perf_counter_ns,
        tracing: Tracing | None = None,
    ) -> None:
        self._tracing = tracing
        self.steps = steps
        self.validator = validator
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.permits = Permits(max_concurrent_requests)
        self.clock_ns = clock_ns
        self.is_draining = False
        self._eos_token_ids = eos_token_ids
        self._max_queue_time_s = max_queue_time_s
        self._open_runs: dict[str, list[Run]] = {}  # by request id, which nothing keeps clients from reusing

    def check_open(self) -> None:
        """Raises ShuttingDown once the server drains."""
        if self.is_draining:
            raise ShuttingDown

    async def drain(self) -> None:
        """No new requests; returns when those under way are over."""
        self.is_draining = True
        await self.steps.drain()

    async def begin(
        self, draft: Draft, mailbox: Mailbox, *, streams: bool, started_ns: int, route: str
    ) -> Run:
        """Check a draft and hand its sequences to the step loop. Raises RequestError.

        streams: every token is told; otherwise only the end of each answer, which keeps its tokens.
        started_ns: when the handler began, on this object's clock.
        """
        run = await self._begin(draft, mailbox, streams=streams, started_ns=started_ns, route=route)
        self._limit_queue_time([run])
        return run

    async def _begin(
        self, draft: Draft, mailbox: Mailbox, *, streams: bool, started_ns: int, route: str
    ) -> Run:
        self.validator.check_choices(draft)
        if streams:
            self.validator.check_stream(draft)
        else:
            self.validator.check_best_of(draft)
        num_permits = draft.num_sequences
        self.permits.take(num_permits)
        trace = None
        if self._tracing is not None:
            trace = self._tracing.generation("generate_stream" if streams else "generate", started_ns)
        try:
            if trace is None:
                requests = await self.validator.validate(draft)
            else:
                with trace.use():
                    requests = await self.validator.validate(draft)
                requests = [replace(request, traceparent=trace.traceparent) for request in requests]
            answers = [
                Answer(
                    request,
                    self.tokenizer,
                    self._eos_token_ids,
                    mailbox,
                    tells_tokens=streams,
                    clock_ns=self.clock_ns,
                    started_ns=started_ns,
                    metrics=self.metrics,
                )
                for request in requests
            ]
        except BaseException as error:
            self.permits.give_back(num_permits)
            if trace is not None:
                trace.fail(str(error))
                trace.end(self.clock_ns())
            raise
        queued_ns = self.clock_ns()
        if trace is not None:
            trace.record("validate", started_ns, queued_ns)
        request = requests[0]
        self.metrics.tgi_request_input_length.observe(len(request.prompt_token_ids))
        self.metrics.tgi_request_max_new_tokens.observe(request.max_new_tokens)
        self.metrics.tgi_request_validation_duration.observe((queued_ns - started_ns) / 1e9)
        run = Run(
            self,
            answers,
            mailbox,
            started_ns=started_ns,
            queued_ns=queued_ns,
            route=route,
            num_choices=draft.num_choices,
            trace=trace,
        )
        mailbox.on_overflow.append(run.close)
        run.submit()
        self._open_runs.setdefault(run.request_id, []).append(run)
        return run

    def forget(self, run: Run) -> None:
        """It is closed."""
        runs = self._open_runs[run.request_id]
        runs.remove(run)
        if not runs:
            del self._open_runs[run.request_id]

    def cancel(self, request_id: str) -> None:
        """End what runs under this id. Raises UnknownRequest."""
        runs = [run for run in self._open_runs.get(request_id, ()) if not run.is_over]
        if not runs:
            raise UnknownRequest(request_id)
        for run in runs:
            run.cancel()

    async def begin_all(
        self,
        drafts: Sequence[Draft],
        mailbox: Mailbox,
        runs: list[Run],
        *,
        streams: bool,
        started_ns: int,
        route: str,
    ) -> None:
        """Begin all or none; those begun are in `runs`, in the drafts' order. Raises the first error."""
        begun = await asyncio.gather(
            *(
                self._begin(draft, mailbox, streams=streams, started_ns=started_ns, route=route)
                for draft in drafts
            ),
            return_exceptions=True,
        )
        runs.extend(run for run in begun if isinstance(run, Run))
        for outcome in begun:
            if isinstance(outcome, BaseException):
                raise outcome
        self._limit_queue_time(runs)

    def _limit_queue_time(self, runs: Sequence[Run]) -> None:
        """Of the runs of one request, together."""
        if self._max_queue_time_s is None:
            return
        timer = asyncio.get_running_loop().call_later(
            self._max_queue_time_s, _end_if_queued, runs, self._max_queue_time_s
        )
        for run in runs:
            run.queue_timer = timer

    async def until_scheduled(self, runs: Sequence[Run], mailbox: Mailbox) -> None:
        """For who wants to tell the status before a stream begins: where the time in the queue is limited,
        until it is over. Raises the error of runs that ended there, or ClientGone.
        """
        if self._max_queue_time_s is None:
            return
        await mailbox.turn(lambda: any(run.has_left_queue or run.is_over for run in runs))
        for run in runs:
            if isinstance(run.error, QueuedTooLong):
                raise run.error

    async def finish(self, runs: Sequence[Run], mailbox: Mailbox, *, keeps_cancelled: bool = False) -> None:
        """Until every answer of runs that do not stream is over. Raises the first error, or ClientGone.

        keeps_cancelled: an answer that was cancelled is one all the same.
        """
        while True:
            for run in runs:
                if run.error is not None and not (keeps_cancelled and isinstance(run.error, Cancelled)):
                    raise run.error
            if all(run.is_over for run in runs):
                return
            await mailbox.take()

    def record_success(self, run: Run) -> None:
        answer = run.best
        timings = run.timings(answer)
        num_tokens = len(answer.token_ids)
        metrics = self.metrics
        metrics.tgi_request_success.inc()
        metrics.tgi_request_duration.observe(timings.total / 1e9)
        metrics.tgi_request_queue_duration.observe(timings.queue / 1e9)
        metrics.tgi_request_inference_duration.observe(timings.inference / 1e9)
        metrics.tgi_request_mean_time_per_token_duration.observe(timings.per_token(num_tokens) / 1e9)
        metrics.tgi_request_generated_tokens.observe(num_tokens)
        log.info(
            "Success",
            route=run.route,
            request_id=run.request_id,
            prompt_tokens=len(answer.request.prompt_token_ids),
            generated_tokens=num_tokens,
            finish_reason=answer.finish_reason,
            seed=answer.seed,
            total_time=duration_text(timings.total),
            validation_time=duration_text(timings.validation),
            queue_time=duration_text(timings.queue),
            inference_time=duration_text(timings.inference),
            time_per_token=duration_text(timings.per_token(num_tokens)),
        )


def _end_if_queued(runs: Sequence[Run], limit_s: float) -> None:
    if not any(run.has_left_queue for run in runs):
        for run in runs:
            run.fail(QueuedTooLong(limit_s))


def duration_text(duration_ns: int) -> str:
    """For people: "52.87ms", "1.2s"."""
    for unit, size in (("s", 10**9), ("ms", 10**6), ("µs", 10**3)):
        if duration_ns >= size:
            return f"{duration_ns / size:.6g}{unit}"
    return f"{duration_ns}ns"
