"""POST /v1/chat/completions: messages through the model's chat template, one choice."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

import msgspec
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
from tgi_router.errors import TemplateError, ToolError, ValidationError
from tgi_router.generation import Answer, GeneratedToken, Generation, Mailbox, Run
from tgi_router.schemas.numbers import shortest_float32
from tgi_router.schemas.openai import asks_for_grammar
from tgi_router.schemas.openai_chat import (
    ChatBody,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ImagePart,
    Message,
    ReplyMessage,
    TokenLogprob,
    ToolCall,
    TopLogprob,
)
from tgi_router.text.chat_template import ChatTemplate
from tgi_router.text.tokenizer import Tokenizer
from tgi_router.validation import Draft

ROUTE = "/v1/chat/completions"


class ChatRoutes:
    """chat_template: None if the model has none; then every request is refused."""

    def __init__(
        self,
        generation: Generation,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        served: Served,
        *,
        payload_limit: int,
    ) -> None:
        self._generation = generation
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._served = served
        self._body = BodyReader(ChatBody, payload_limit)

    async def chat_completions(self, request: Request) -> Response:
        self._generation.check_open()
        self._generation.metrics.tgi_request_count.inc()
        started_ns = self._generation.clock_ns()
        body = await self._body.read(request)
        check(body)
        if self._chat_template is None:
            raise TemplateError("template not found")
        prompt = self._chat_template.render(template_messages(body.messages, self._chat_template))
        mailbox = Mailbox()
        watch = ClientWatch(request.receive, mailbox)
        run: Run | None = None
        is_streaming = False
        try:
            run = await self._generation.begin(
                draft_of(body, prompt), mailbox, streams=bool(body.stream), started_ns=started_ns, route=ROUTE
            )
            if body.stream:
                is_streaming = True
                headers = {
                    "x-compute-type": self._served.compute_type,
                    "x-compute-characters": str(len(prompt)),
                }
                return EventStream(self._frames(body, run, mailbox), mailbox, run.close, headers)
            await self._generation.finish([run], mailbox)
            return JSONReply(
                self._reply(body, run.answers[0]),
                headers=compute_headers([run], self._served.compute_type, len(prompt)),
            )
        finally:
            watch.stop()
            if run is not None and not is_streaming:
                run.close()

    def _model_name(self, body: ChatBody) -> str:
        return self._served.model_name if body.model in (None, "tgi") else str(body.model)

    def _reply(self, body: ChatBody, answer: Answer) -> ChatCompletion:
        logprobs = None
        if body.logprobs:
            logprobs = ChatLogprobs([self._logprob(token) for token in answer.tokens])
        return ChatCompletion(
            object="chat.completion",
            id=new_id(),
            created=int(time.time()),
            model=self._model_name(body),
            system_fingerprint=self._served.system_fingerprint,
            choices=[
                ChatChoice(
                    0,
                    ReplyMessage("assistant", answer.generated_text()),
                    logprobs,
                    finish_reason_of(answer),
                )
            ],
            usage=usage_of([answer]),
        )

    async def _frames(self, body: ChatBody, run: Run, mailbox: Mailbox) -> AsyncIterator[bytes]:
        answer = run.answers[0]
        head = (
            b'data: {"object":"chat.completion.chunk","id":%b,"created":%d,"model":%b,"system_fingerprint":%b'
        ) % (
            encode_json(new_id()),
            int(time.time()),
            encode_json(self._model_name(body)),
            encode_json(self._served.system_fingerprint),
        )
        delta_head = head + b',"choices":[{"index":0,"delta":{"role":"assistant","content":'
        while not answer.is_over or mailbox.has_news:
            news = await mailbox.take()
            chunks = []
            for _, token in news:
                if token is not None:
                    reason = finish_reason_of(answer) if answer.ends_with(token) else None
                    logprobs = ChatLogprobs([self._logprob(token)]) if body.logprobs else None
                    chunks.append(
                        b'%b%b},"logprobs":%b,"finish_reason":%b}],"usage":null}\n\n'
                        % (delta_head, encode_json(token.shown), encode_json(logprobs), encode_json(reason))
                    )
            if chunks or not news:
                yield b"".join(chunks)
        if answer.error is not None:
            record_failure(self._generation.metrics, answer.error, ROUTE)
            yield error_frame(answer.error)
        elif body.include_usage:
            yield b'%b,"choices":[],"usage":%b}\n\n' % (head, encode_json(usage_of([answer])))
        yield DONE

    def _logprob(self, token: GeneratedToken) -> TokenLogprob:
        return TokenLogprob(
            token.text,
            shortest_float32(token.logprob),
            [
                TopLogprob(self._tokenizer.decode_one(token_id), shortest_float32(logprob))
                for token_id, logprob in token.top_tokens
            ],
        )


def check(body: ChatBody) -> None:
    """Refuse what would need an answer that we cannot give. Raises ValidationError or ToolError."""
    wants_grammar = asks_for_grammar(body.response_format)
    if wants_grammar and body.tools is not None:
        raise ToolError("Grammar and tools are mutually exclusive")
    if wants_grammar:
        raise ValidationError("grammar is not supported")
    refuse(
        tools=body.tools and body.tool_choice != "none",
        n=(body.n or 1) > 1,
        logit_bias=body.logit_bias,
    )


def template_messages(messages: Sequence[Message], template: ChatTemplate) -> list[dict[str, Any]]:
    """What the template sees of them: content is always one string, other keys are there if the client set
    them.
    """
    seen: list[dict[str, Any]] = []
    for message in messages:
        shown: dict[str, Any] = {"role": message.role, "content": content_text(message)}
        if message.name is not None:
            shown["name"] = message.name
        if message.tool_call_id is not None:
            shown["tool_call_id"] = message.tool_call_id
        if message.tool_calls:
            if template.reads_tool_calls:
                shown["tool_calls"] = [template_tool_call(call) for call in message.tool_calls]
            elif not shown["content"]:
                shown["content"] = tool_calls_text(message.tool_calls)
        seen.append(shown)
    return seen


def content_text(message: Message) -> str:
    """Parts stand behind one another without a separator; an image is written as Markdown."""
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    return "".join(
        f"![]({part.image_url.url})" if isinstance(part, ImagePart) else part.text for part in message.content
    )


def template_tool_call(call: ToolCall) -> dict[str, Any]:
    """As transformers hands it to templates: arguments are an object, even if the client sent its JSON
    text.
    """
    arguments = call.function.given_arguments
    if isinstance(arguments, str):
        with suppress(ValueError):  # some model wrote it: templates print whatever it is
            arguments = json.loads(arguments)
    return {
        "id": call.id,
        "type": call.type,
        "function": {"name": call.function.name, "arguments": arguments},
    }


def tool_calls_text(calls: Sequence[ToolCall]) -> str:
    """For templates that know nothing of tools."""
    return msgspec.json.encode(
        [
            {
                "id": call.id,
                "type": call.type,
                "function": {
                    "description": call.function.description,
                    "name": call.function.name,
                    "arguments": arguments_text(call.function.given_arguments),
                },
            }
            for call in calls
        ]
    ).decode()


def arguments_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()


def new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def draft_of(body: ChatBody, prompt: str) -> Draft:
    is_greedy = body.temperature == 0
    return Draft(
        inputs=prompt,
        add_special_tokens=False,  # the template writes them
        do_sample=not is_greedy,
        is_greedy=is_greedy,
        temperature=None if is_greedy else body.temperature,
        top_p=top_p_of(body.top_p),
        output_frequency_penalty=body.frequency_penalty,
        output_presence_penalty=body.presence_penalty,
        max_new_tokens=body.max_tokens if body.max_tokens is not None else body.max_completion_tokens,
        stop=stop_strings(body.stop),
        trim_stop=True,
        seed=body.seed,
        top_n_tokens=body.top_logprobs,
    )
