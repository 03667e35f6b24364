"""POST /v1/completions: `n` choices for each prompt of the body, in the order of the prompts."""

import time
import uuid
from collections.abc import Iterator, Sequence

from starlette.requests import Request
from starlette.responses import Response

from tgi_router.answer import Answer, GeneratedToken
from tgi_router.api.body import BodyReader
from tgi_router.api.grammar import asked_grammar
from tgi_router.api.openai import (
    Served,
    error_frame,
    finish_reason_of,
    logit_bias_of,
    stop_strings,
    top_k_of,
    top_p_of,
    usage_of,
)
from tgi_router.api.openai_logprobs import CompletionLogprobsWriter, joined
from tgi_router.api.replies import JSONReply, compute_headers, encode_json, record_failure
from tgi_router.api.sse import DONE, ClientWatch, EventStream
from tgi_router.errors import BatchSizeExceeded, SuffixNotSupported, ValidationError
from tgi_router.generation import Generation, Run
from tgi_router.mailbox import Mailbox, News
from tgi_router.metrics import Metrics
from tgi_router.schemas.openai import Usage
from tgi_router.schemas.openai_completions import (
    Completion,
    CompletionBody,
    CompletionChoice,
)
from tgi_router.text.tokenizer import Tokenizer
from tgi_router.validation import Draft

ROUTE = "/v1/completions"


class CompletionRoutes:
    def __init__(
        self, generation: Generation, served: Served, *, max_client_batch_size: int, payload_limit: int
    ) -> None:
        self._generation = generation
        self._tokenizer = generation.tokenizer
        self._served = served
        self._max_client_batch_size = max_client_batch_size
        self._body = BodyReader(CompletionBody, payload_limit)

    async def completions(self, request: Request) -> Response:
        self._generation.check_open()
        self._generation.metrics.tgi_request_count.inc()
        started_ns = self._generation.clock_ns()
        body = await self._body.read(request)
        self._check(body)
        drafts = [draft_of(body, prompt) for prompt in body.prompts]
        mailbox = Mailbox(self._generation.post)
        watch = ClientWatch(request.receive, mailbox)
        runs: list[Run] = []

        def close() -> None:
            for run in runs:
                run.close()

        is_streaming = False
        try:
            await self._generation.begin_all(
                drafts, mailbox, runs, streams=bool(body.stream), started_ns=started_ns, route=ROUTE
            )
            num_characters = sum(len(run.answers[0].request.prompt) for run in runs)
            if body.stream:
                await self._generation.until_scheduled(runs, mailbox)
                is_streaming = True
                headers = {
                    "x-compute-type": self._served.compute_type,
                    "x-compute-characters": str(num_characters),
                }
                return EventStream(self._events(body, runs), mailbox, close, headers)
            await self._generation.finish(runs, mailbox, keeps_cancelled=True)
            return JSONReply(
                self._reply(body, runs),
                headers=compute_headers(runs, self._served.compute_type, num_characters),
            )
        finally:
            watch.stop()
            if not is_streaming:
                close()

    def _check(self, body: CompletionBody) -> None:
        """Raises RequestError for what we cannot give."""
        if body.suffix is not None:
            raise SuffixNotSupported
        if len(body.prompts) > self._max_client_batch_size:
            raise BatchSizeExceeded(self._max_client_batch_size)
        num_choices = num_choices_of(body)
        if body.best_of is not None and body.best_of < num_choices:
            raise ValidationError(f"`best_of` must be >= `n`. Given: {body.best_of} and {num_choices}")

    def _events(self, body: CompletionBody, runs: list[Run]) -> "_CompletionEvents":
        writers = {
            answer: _ChoiceWriter(body, self._tokenizer, index, answer)
            for index, answer in enumerate(chosen(runs))
        }
        return _CompletionEvents(
            body, runs, writers, _FrameWriter(self._served, body), self._generation.metrics
        )

    def _reply(self, body: CompletionBody, runs: list[Run]) -> Completion:
        writers = [
            _ChoiceWriter(body, self._tokenizer, index, answer) for index, answer in enumerate(chosen(runs))
        ]
        return Completion(
            object="text_completion",
            id=new_id(),
            created=int(time.time()),
            model=self._served.model_name,
            system_fingerprint=self._served.system_fingerprint,
            choices=[folded(writer.pieces()) for writer in writers],
            usage=usage_for(body, runs),
        )


class _ChoiceWriter:
    """One choice, piece by piece: the echoed prompt, then each token. Their fold is what is not streamed."""

    def __init__(self, body: CompletionBody, tokenizer: Tokenizer, index: int, answer: Answer) -> None:
        self._index = index
        self._answer = answer
        self._echoes = bool(body.echo)
        self._shows_output = not echoes_only(body)
        self._logprobs = None if body.logprobs is None else CompletionLogprobsWriter(tokenizer, answer)

    def pieces(self) -> Iterator[CompletionChoice]:
        """Of an answer that is over, with its tokens."""
        for token in self._answer.tokens:
            yield from self.next_pieces(token)
        if self._answer.is_cancelled:
            yield from self.next_pieces(None)

    def next_pieces(self, token: GeneratedToken | None) -> list[CompletionChoice]:
        """What a token adds. None: the answer was cancelled."""
        is_last = token is None or self._answer.ends_with(token)
        reason = finish_reason_of(self._answer) if is_last else None
        pieces = []
        if self._echoes:
            self._echoes = False
            logprobs = None if self._logprobs is None else self._logprobs.prompt()
            text = self._answer.request.prompt
            echo_reason = None if self._shows_output else reason
            pieces.append(CompletionChoice(self._index, text, logprobs, echo_reason))
        if token is None and self._shows_output:
            pieces.append(CompletionChoice(self._index, self._answer.rest, None, reason))
        elif token is not None and self._shows_output:
            logprobs = None if self._logprobs is None else self._logprobs.token(token)
            pieces.append(CompletionChoice(self._index, token.shown, logprobs, reason))
        return pieces


def folded(pieces: Iterator[CompletionChoice]) -> CompletionChoice:
    all_pieces = list(pieces)
    logprobs = [piece.logprobs for piece in all_pieces if piece.logprobs is not None]
    return CompletionChoice(
        all_pieces[-1].index,
        "".join(piece.text for piece in all_pieces),
        joined(logprobs) if logprobs else None,
        all_pieces[-1].finish_reason,
    )


class _CompletionEvents:
    """The events of a stream: chunks of every choice, then the usage if it is wanted, then [DONE]."""

    def __init__(
        self,
        body: CompletionBody,
        runs: list[Run],
        writers: "dict[Answer, _ChoiceWriter]",
        frames: "_FrameWriter",
        metrics: Metrics,
    ) -> None:
        self._body = body
        self._runs = runs
        self._open = writers
        self._frames = frames
        self._metrics = metrics

    @property
    def is_over(self) -> bool:
        return not self._open

    def tell(self, news: News) -> bytes:
        data: list[bytes] = []
        for answer, token in news:
            if token is not None or answer.is_cancelled:
                for choice in self._open[answer].next_pieces(token):
                    data.append(self._frames.chunk(choice, answer))
            else:
                assert answer.error is not None
                record_failure(self._metrics, answer.error, ROUTE)
                data.append(error_frame(answer.error))
            if token is None or answer.ends_with(token):
                del self._open[answer]
        if not self._open:
            if self._frames.wants_usage_chunk and not any(run.has_failed for run in self._runs):
                data.append(self._frames.usage_chunk(usage_for(self._body, self._runs)))
            data.append(DONE)
        return b"".join(data)


class _FrameWriter:
    """Chunks of one response. All but the choice is written once."""

    def __init__(self, served: Served, body: CompletionBody) -> None:
        include_usage = None if body.stream_options is None else body.stream_options.include_usage
        # OpenAI's way when a client says what it wants; else TGI's: a choice's usage on its last chunk.
        self.wants_usage_chunk = include_usage is True
        self._usage_on_last = include_usage is None
        self._echoes_only = echoes_only(body)
        self._head = b'"object":"text_completion","id":%b,"created":%d' % (
            encode_json(new_id()),
            int(time.time()),
        )
        self._tail = b'"model":%b,"system_fingerprint":%b' % (
            encode_json(served.model_name),
            encode_json(served.system_fingerprint),
        )
        null_usage = b',"usage":null' if self.wants_usage_chunk else b""
        self._before_choice = b'data: {%b,"choices":[' % self._head
        self._after_choice = b"],%b%b}\n\n" % (self._tail, null_usage)

    def chunk(self, choice: CompletionChoice, answer: Answer) -> bytes:
        if choice.finish_reason is None or not self._usage_on_last:
            return self._before_choice + encode_json(choice) + self._after_choice
        num_generated = 0 if self._echoes_only else len(answer.token_ids)
        usage = encode_json(Usage.of(len(answer.request.prompt_token_ids), num_generated))
        return b'data: {%b,%b,"choices":[%b],"usage":%b}\n\n' % (
            self._head,
            self._tail,
            encode_json(choice),
            usage,
        )

    def usage_chunk(self, usage: Usage) -> bytes:
        return b'data: {%b,"choices":[],%b,"usage":%b}\n\n' % (self._head, self._tail, encode_json(usage))


def chosen(runs: Sequence[Run]) -> list[Answer]:
    """In the order of the choices."""
    return [answer for run in runs for answer in run.chosen]


def echoes_only(body: CompletionBody) -> bool:
    """The prompt and its logprobs are all that is wanted. (A sequence that says nothing cannot be run.)"""
    return bool(body.echo) and max_tokens_of(body) == 0


def usage_for(body: CompletionBody, runs: Sequence[Run]) -> Usage:
    usage = usage_of(runs)
    return Usage.of(usage.prompt_tokens, 0) if echoes_only(body) else usage


def max_tokens_of(body: CompletionBody) -> int | None:
    return body.max_tokens if body.max_tokens is not None else body.max_completion_tokens


def num_choices_of(body: CompletionBody) -> int:
    return 1 if body.n is None else body.n


def new_id() -> str:
    return f"cmpl-{uuid.uuid4().hex}"


def draft_of(body: CompletionBody, prompt: str | tuple[int, ...]) -> Draft:
    is_greedy = body.temperature == 0
    num_choices = num_choices_of(body)
    return Draft(
        inputs=prompt if isinstance(prompt, str) else "",
        prompt_token_ids=None if isinstance(prompt, str) else prompt,
        add_special_tokens=True,
        num_choices=num_choices,
        # As many as are given need no choosing between them: that can be streamed.
        best_of=body.best_of if body.best_of is not None and body.best_of > num_choices else 1,
        one_seed_for_all=True,
        do_sample=not is_greedy,
        is_greedy=is_greedy,
        temperature=None if is_greedy else body.temperature,
        top_k=top_k_of(body.top_k),
        top_p=top_p_of(body.top_p),
        min_p=body.min_p,
        logit_bias=logit_bias_of(body.logit_bias),
        repetition_penalty=body.repetition_penalty,
        output_frequency_penalty=body.frequency_penalty,
        output_presence_penalty=body.presence_penalty,
        max_new_tokens=1 if echoes_only(body) else max_tokens_of(body),
        stop=stop_strings(body.stop),
        trim_stop=True,
        ignore_eos=bool(body.ignore_eos),
        seed=body.seed,
        grammar=asked_grammar(body.response_format),
        needs_prompt_logprobs=bool(body.echo) and body.logprobs is not None,
        top_n_tokens=body.logprobs,
        top_n_field="logprobs",
    )
