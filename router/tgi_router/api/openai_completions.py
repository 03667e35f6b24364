"""POST /v1/completions: one generation for each prompt of the body."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence

from starlette.requests import Request
from starlette.responses import Response

from tgi_router.api.body import BodyReader
from tgi_router.api.openai import (
    Served,
    error_frame,
    finish_reason_of,
    refuse,
    stop_strings,
    top_p_of,
    usage_of,
)
from tgi_router.api.replies import JSONReply, compute_headers, encode_json, record_failure
from tgi_router.api.sse import DONE, ClientWatch, EventStream
from tgi_router.errors import BatchSizeExceeded, SuffixNotSupported, ValidationError
from tgi_router.generation import Answer, GeneratedToken, Generation, Mailbox, Run
from tgi_router.schemas.openai import asks_for_grammar
from tgi_router.schemas.openai_completions import Completion, CompletionBody, CompletionChoice
from tgi_router.validation import Draft


class CompletionRoutes:
    def __init__(
        self, generation: Generation, served: Served, *, max_client_batch_size: int, payload_limit: int
    ) -> None:
        self._generation = generation
        self._served = served
        self._max_client_batch_size = max_client_batch_size
        self._body = BodyReader(CompletionBody, payload_limit)

    async def completions(self, request: Request) -> Response:
        self._generation.check_open()
        self._generation.metrics.tgi_request_count.inc()
        started_ns = self._generation.clock_ns()
        body = await self._body.read(request)
        prompts = self._check(body)
        drafts = [draft_of(body, prompt) for prompt in prompts]
        mailbox = Mailbox()
        watch = ClientWatch(request.receive, mailbox)
        runs: list[Run] = []

        def close() -> None:
            for run in runs:
                run.close()

        is_streaming = False
        try:
            await self._begin_all(drafts, mailbox, runs, streams=bool(body.stream), started_ns=started_ns)
            if body.stream:
                is_streaming = True
                headers = {
                    "x-compute-type": self._served.compute_type,
                    "x-compute-characters": str(sum(map(len, prompts))),
                }
                return EventStream(self._frames(body, runs, mailbox), mailbox, close, headers)
            await self._generation.finish(runs, mailbox)
            return JSONReply(
                self._reply(runs),
                headers=compute_headers(runs, self._served.compute_type, sum(map(len, prompts))),
            )
        finally:
            watch.stop()
            if not is_streaming:
                close()

    def _check(self, body: CompletionBody) -> list[str]:
        """The prompts of a body that asks for nothing we cannot give."""
        if body.suffix is not None:
            raise SuffixNotSupported
        num_prompts = len(body.prompt) if isinstance(body.prompt, list) else 1
        if num_prompts > self._max_client_batch_size:
            raise BatchSizeExceeded(self._max_client_batch_size)
        if asks_for_grammar(body.response_format):
            raise ValidationError("grammar is not supported")
        refuse(
            n=(body.n or 1) > 1,
            best_of=(body.best_of or 1) > 1,
            echo=body.echo,
            logprobs=body.logprobs is not None,
            logit_bias=body.logit_bias,
        )
        if (prompts := body.prompts) is None:
            raise ValidationError("`prompt` as token ids is not supported")
        return prompts

    async def _begin_all(
        self, drafts: Sequence[Draft], mailbox: Mailbox, runs: list[Run], *, streams: bool, started_ns: int
    ) -> None:
        """Begin all or none; those begun are in `runs`, in the prompts' order. Raises the first error."""
        begun = await asyncio.gather(
            *(
                self._generation.begin(
                    draft, mailbox, streams=streams, started_ns=started_ns, route="/v1/completions"
                )
                for draft in drafts
            ),
            return_exceptions=True,
        )
        runs.extend(run for run in begun if isinstance(run, Run))
        for outcome in begun:
            if isinstance(outcome, BaseException):
                raise outcome

    def _reply(self, runs: list[Run]) -> Completion:
        answers = [run.answers[0] for run in runs]
        return Completion(
            object="text_completion",
            id=new_id(),
            created=int(time.time()),
            model=self._served.model_name,
            system_fingerprint=self._served.system_fingerprint,
            choices=[
                CompletionChoice(index, answer.generated_text(), None, finish_reason_of(answer))
                for index, answer in enumerate(answers)
            ],
            usage=usage_of(answers),
        )

    async def _frames(self, body: CompletionBody, runs: list[Run], mailbox: Mailbox) -> AsyncIterator[bytes]:
        answers = [run.answers[0] for run in runs]
        writer = _FrameWriter(self._served, body, answers)
        remaining = set(answers)
        while remaining:
            news = await mailbox.take()
            data = []
            for answer, token in news:
                if token is not None:
                    data.append(writer.chunk(answer, token))
                    if answer.ends_with(token):
                        remaining.discard(answer)
                else:
                    assert answer.error is not None
                    record_failure(self._generation.metrics, answer.error, "/v1/completions")
                    data.append(error_frame(answer.error))
                    remaining.discard(answer)
            if data or not news:
                yield b"".join(data)
        if writer.wants_usage_chunk:
            yield writer.usage_chunk()
        yield DONE


class _FrameWriter:
    """Chunks of one response. All but the text is written once."""

    def __init__(self, served: Served, body: CompletionBody, answers: list[Answer]) -> None:
        include_usage = None if body.stream_options is None else body.stream_options.include_usage
        # OpenAI's way when a client says what it wants; else TGI's: a prompt's usage on its last chunk.
        self.wants_usage_chunk = include_usage is True
        self._usage_on_last = include_usage is None
        self._answers = answers
        self._index = {answer: index for index, answer in enumerate(answers)}
        self._head = b'"object":"text_completion","id":%b,"created":%d' % (
            encode_json(new_id()),
            int(time.time()),
        )
        self._tail = b'"model":%b,"system_fingerprint":%b' % (
            encode_json(served.model_name),
            encode_json(served.system_fingerprint),
        )

    def chunk(self, answer: Answer, token: GeneratedToken) -> bytes:
        is_last = answer.ends_with(token)
        reason = finish_reason_of(answer) if is_last else None
        choices = b'"choices":[{"index":%d,"text":%b,"logprobs":null,"finish_reason":%b}]' % (
            self._index[answer],
            encode_json(token.shown),
            encode_json(reason),
        )
        if is_last and self._usage_on_last:
            usage = encode_json(usage_of([answer]))
            return b'data: {%b,%b,%b,"usage":%b}\n\n' % (self._head, self._tail, choices, usage)
        null_usage = b',"usage":null' if self.wants_usage_chunk else b""
        return b"data: {%b,%b,%b%b}\n\n" % (self._head, choices, self._tail, null_usage)

    def usage_chunk(self) -> bytes:
        usage = encode_json(usage_of(self._answers))
        return b'data: {%b,"choices":[],%b,"usage":%b}\n\n' % (self._head, self._tail, usage)


def new_id() -> str:
    return f"cmpl-{uuid.uuid4().hex}"


def draft_of(body: CompletionBody, prompt: str) -> Draft:
    is_greedy = body.temperature == 0
    return Draft(
        inputs=prompt,
        add_special_tokens=True,
        do_sample=not is_greedy,
        is_greedy=is_greedy,
        temperature=None if is_greedy else body.temperature,
        top_p=top_p_of(body.top_p),
        repetition_penalty=body.repetition_penalty,
        output_frequency_penalty=body.frequency_penalty,
        output_presence_penalty=body.presence_penalty,
        max_new_tokens=body.max_tokens,
        stop=stop_strings(body.stop),
        trim_stop=True,
        seed=body.seed,
    )
