"""Request -> stream of tokens -> reply: the reading end of the sequences that the step loop runs.

    begin(draft) -> Run -> its Answers, one for each choice -> what they tell arrives in a Mailbox

A Run is one draft under way; Generation begins them, within the concurrency limit, and knows those that are
open.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Protocol

import structlog
from msgspec import Struct

from tgi_router.answer import Answer
from tgi_router.errors import (
    Cancelled,
    QueuedTooLong,
    RequestError,
    ShuttingDown,
    UnknownRequest,
)
from tgi_router.mailbox import Mailbox, Post
from tgi_router.metrics import Metrics
from tgi_router.permits import Permits
from tgi_router.request import Listener, Request
from tgi_router.text.tokenizer import Tokenizer
from tgi_router.tracing import GenerationTrace, Tracing
from tgi_router.validation import Draft, Validator

log = structlog.get_logger(__name__)


class Steps(Protocol):
    """What this room needs of the step loop."""

    def submit(self, request: Request, listener: Listener) -> int: ...
    def cancel(self, sequence_id: int) -> None: ...
    async def drain(self) -> None: ...


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
        self._mailbox.on_overflow.remove(self.close)
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
        self.post = Post()
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
                try:
                    raise outcome
                finally:
                    # Else the error, with all of the request, would hang on this frame, which hangs on the
                    # error's traceback, until the garbage collector comes.
                    del begun, outcome
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
