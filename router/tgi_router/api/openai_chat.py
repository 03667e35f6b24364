"""POST /v1/chat/completions: messages through the model's chat template, `n` choices."""

import json
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tgi_router.answer import Answer
from tgi_router.api.body import BodyReader
from tgi_router.api.grammar import asked_grammar
from tgi_router.api.openai import (
    Served,
    error_frame,
    logit_bias_of,
    stop_strings,
    top_k_of,
    top_p_of,
    usage_of,
)
from tgi_router.api.openai_logprobs import chat_logprob
from tgi_router.api.openai_messages import EMPTY_DELTA, MessageStream, whole_message
from tgi_router.api.replies import JSONReply, compute_headers, encode_json, record_failure
from tgi_router.api.sse import DONE, ClientWatch, EventStream
from tgi_router.errors import TemplateError, ToolError
from tgi_router.generation import Generation, Run
from tgi_router.grammar.source import AskedGrammar
from tgi_router.mailbox import Mailbox, News
from tgi_router.metrics import Metrics
from tgi_router.schemas.openai_chat import (
    ChatBody,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ImagePart,
    Message,
    NamedToolChoice,
    ToolCall,
)
from tgi_router.text import reasoning
from tgi_router.text.chat_template import ChatTemplate
from tgi_router.text.message import Parser, PlainText
from tgi_router.text.reasoning import ReasoningFormat, ReasoningParser, begins_in_thought
from tgi_router.text.tokenizer import Tokenizer
from tgi_router.text.tool_parsers import registry
from tgi_router.text.tool_parsers.registry import ToolCallFormat
from tgi_router.text.tools import Offer, Tool, is_too_deep
from tgi_router.validation import Draft

ROUTE = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Chat:
    """One body, ready to be generated and read."""

    prompt: str
    draft: Draft
    new_parser: Callable[[], Parser]  # for each of the answers


class ChatRoutes:
    """chat_template: None if the model has none; then every request is refused.

    tool_call_parser, reasoning_parser: as in Settings.
    """

    def __init__(
        self,
        generation: Generation,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        served: Served,
        *,
        tool_call_parser: ToolCallFormat | None,
        reasoning_parser: ReasoningFormat | Literal["auto"] | None,
        payload_limit: int,
    ) -> None:
        self._generation = generation
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        source = chat_template.source if chat_template is not None else ""
        self._tool_call_format = tool_call_parser or registry.detect(source)
        self._reasoning_format = reasoning.detect(source) if reasoning_parser == "auto" else reasoning_parser
        self._served = served
        self._body = BodyReader(ChatBody, payload_limit)

    async def chat_completions(self, request: Request) -> Response:
        self._generation.check_open()
        self._generation.metrics.tgi_request_count.inc()
        started_ns = self._generation.clock_ns()
        body = await self._body.read(request)
        chat = await self.prepare(body)
        mailbox = Mailbox(self._generation.post)
        watch = ClientWatch(request.receive, mailbox)
        run: Run | None = None
        is_streaming = False
        try:
            run = await self._generation.begin(
                chat.draft, mailbox, streams=bool(body.stream), started_ns=started_ns, route=ROUTE
            )
            if body.stream:
                await self._generation.until_scheduled([run], mailbox)
                is_streaming = True
                headers = {
                    "x-compute-type": self._served.compute_type,
                    "x-compute-characters": str(len(chat.prompt)),
                }
                return EventStream(self._events(body, chat, run), mailbox, run.close, headers)
            await self._generation.finish([run], mailbox, keeps_cancelled=True)
            return JSONReply(
                self._reply(body, chat, run),
                headers=compute_headers([run], self._served.compute_type, len(chat.prompt)),
            )
        finally:
            watch.stop()
            if run is not None and not is_streaming:
                run.close()

    async def prepare(self, body: ChatBody) -> Chat:
        """Raises ValidationError, ToolError or TemplateError."""
        check(body)
        offer = offer_of(body)
        grammar = asked_grammar(body.response_format)
        if offer is not None and offer.is_forced:
            grammar = AskedGrammar("json", offer.schema(self._tool_call_format))
        prompt = await self._prompt(body, offer)
        new_parser = self._new_parser(offer, prompt, has_grammar=grammar is not None)
        draft = draft_of(body, prompt, grammar, new_parser().shown_special)
        return Chat(prompt, draft, new_parser)

    async def _prompt(self, body: ChatBody, offer: Offer | None) -> str:
        template = self._chat_template
        if template is None:
            raise TemplateError("template not found")

        async def render(*, arguments_as_text: bool = False) -> str:
            messages = template_messages(body.messages, template, arguments_as_text=arguments_as_text)
            if offer is not None:
                messages = offer.with_prompt(
                    messages, body.tool_prompt, template_reads_tools=template.reads_tools
                )
            return await template.prompt(
                messages,
                tools=None if offer is None else offer.for_template(),
                documents=body.documents,
                name=body.chat_template,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                variables=body.chat_template_kwargs,
            )

        try:
            return await render()
        except TemplateError:
            if not any(message.tool_calls for message in body.messages):
                raise
            # Most templates want the arguments of calls as objects, some only take their text.
            with suppress(TemplateError):
                return await render(arguments_as_text=True)
            raise

    def _new_parser(self, offer: Offer | None, prompt: str, *, has_grammar: bool) -> Callable[[], Parser]:
        def answer() -> Parser:
            return PlainText() if offer is None else offer.parser(self._tool_call_format)

        format = self._reasoning_format
        if format is None or has_grammar:  # which leaves no room for thoughts
            return answer
        is_open = begins_in_thought(format, prompt)
        return lambda: ReasoningParser(answer(), is_open=is_open)

    def _model_name(self, body: ChatBody) -> str:
        return self._served.model_name if body.model in (None, "tgi") else str(body.model)

    def _events(self, body: ChatBody, chat: Chat, run: Run) -> "_ChatEvents":
        head = (
            b'data: {"object":"chat.completion.chunk","id":%b,"created":%d,"model":%b,"system_fingerprint":%b'
        ) % (
            encode_json(new_id()),
            int(time.time()),
            encode_json(self._model_name(body)),
            encode_json(self._served.system_fingerprint),
        )
        return _ChatEvents(
            chat,
            run,
            self._tokenizer,
            self._generation.metrics,
            head,
            has_logprobs=bool(body.logprobs),
            tells_usage=body.include_usage,
        )

    def _reply(self, body: ChatBody, chat: Chat, run: Run) -> ChatCompletion:
        return ChatCompletion(
            object="chat.completion",
            id=new_id(),
            created=int(time.time()),
            model=self._model_name(body),
            system_fingerprint=self._served.system_fingerprint,
            choices=[self._choice(body, chat, index, answer) for index, answer in enumerate(run.answers)],
            usage=usage_of([run]),
        )

    def _choice(self, body: ChatBody, chat: Chat, index: int, answer: Answer) -> ChatChoice:
        logprobs = None
        if body.logprobs:
            logprobs = ChatLogprobs([chat_logprob(self._tokenizer, answer, token) for token in answer.tokens])
        message, finish_reason = whole_message(chat.new_parser(), answer)
        return ChatChoice(index, message, logprobs, finish_reason)


class _ChatEvents:
    """The events of a stream: chunks of every choice, then the usage if it is wanted, then [DONE]."""

    def __init__(
        self,
        chat: Chat,
        run: Run,
        tokenizer: Tokenizer,
        metrics: Metrics,
        head: bytes,
        *,
        has_logprobs: bool,
        tells_usage: bool,
    ) -> None:
        self._run = run
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._has_logprobs = has_logprobs
        self._tells_usage = tells_usage
        self._head = head
        self._choice_heads = {
            answer: b'%b,"choices":[{"index":%d,"delta":' % (head, index)
            for index, answer in enumerate(run.answers)
        }
        self._open = {answer: MessageStream(chat.new_parser()) for answer in run.answers}

    @property
    def is_over(self) -> bool:
        return not self._open

    def tell(self, news: News) -> bytes:
        frames: list[bytes] = []
        for answer, token in news:
            is_last = token is None or answer.ends_with(token)
            if token is not None:
                logprobs = None
                if self._has_logprobs:
                    logprobs = ChatLogprobs([chat_logprob(self._tokenizer, answer, token)])
                frames += self._chunks(answer, token.shown, logprobs, is_last=is_last)
            elif answer.is_cancelled:
                frames += self._chunks(answer, answer.rest, None, is_last=True)
            else:
                assert answer.error is not None
                record_failure(self._metrics, answer.error, ROUTE)
                frames.append(error_frame(answer.error))
            if is_last:
                del self._open[answer]
        if not self._open:
            if self._tells_usage and not self._run.has_failed:
                frames.append(
                    b'%b,"choices":[],"usage":%b}\n\n' % (self._head, encode_json(usage_of([self._run])))
                )
            frames.append(DONE)
        return b"".join(frames)

    def _chunks(
        self, answer: Answer, text: str, logprobs: ChatLogprobs | None, *, is_last: bool
    ) -> list[bytes]:
        """What one token adds: the logprobs go with its first delta, the finish reason with its last."""
        stream = self._open[answer]
        deltas = stream.push(text, is_last=is_last)
        if not deltas and (is_last or stream.tells_every_token or logprobs is not None):
            deltas = [EMPTY_DELTA]
        reason = stream.finish_reason(answer) if is_last else None
        last = len(deltas) - 1
        return [
            _CHUNK
            % (
                self._choice_heads[answer],
                delta,
                b"null" if logprobs is None or number > 0 else encode_json(logprobs),
                b"null" if reason is None or number < last else encode_json(reason),
            )
            for number, delta in enumerate(deltas)
        ]


_CHUNK = b'%b%b,"logprobs":%b,"finish_reason":%b}],"usage":null}\n\n'


def check(body: ChatBody) -> None:
    """Refuse what would need an answer that we cannot give. Raises ValidationError or ToolError."""
    if asked_grammar(body.response_format) is not None and body.tools is not None:
        raise ToolError("Grammar and tools are mutually exclusive")


def offer_of(body: ChatBody) -> Offer | None:
    """None: no tools. Raises ToolError."""
    choice = body.tool_choice
    if body.tools is None or choice == "none":
        return None
    tools = tuple(
        Tool(tool.function.name, tool.function.description, tool.function.given_parameters)
        for tool in body.tools
    )
    for tool in tools:
        if is_too_deep(tool.parameters):
            raise ToolError(f"the parameters of {tool.name} are nested too deeply")
    if isinstance(choice, NamedToolChoice) or choice not in (None, "auto", "required"):
        name = choice.function.name if isinstance(choice, NamedToolChoice) else choice
        named = tuple(tool for tool in tools if tool.name == name)[:1]
        if not named:
            raise ToolError(f"Tool with name {name} not found")
        return Offer(named, is_forced=True, is_parallel=False)
    if not tools:
        return None
    return Offer(tools, is_forced=choice == "required", is_parallel=body.parallel_tool_calls is not False)


def template_messages(
    messages: Sequence[Message], template: ChatTemplate, *, arguments_as_text: bool = False
) -> list[dict[str, Any]]:
    """What the template sees of them: content is one string, other keys are there if the client set them."""
    seen: list[dict[str, Any]] = []
    for message in messages:
        shown: dict[str, Any] = {"role": message.role}
        if message.content is not None:
            shown["content"] = content_text(message)
        if message.reasoning_content is not None:
            shown["reasoning_content"] = message.reasoning_content
        if message.name is not None:
            shown["name"] = message.name
        if message.tool_call_id is not None:
            shown["tool_call_id"] = message.tool_call_id
        if message.tool_calls:
            if template.reads_tool_calls:
                calls = message.tool_calls
                shown["tool_calls"] = [template_tool_call(call, arguments_as_text) for call in calls]
            elif not shown.get("content"):
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


def template_tool_call(call: ToolCall, arguments_as_text: bool) -> dict[str, Any]:
    """As transformers hands it to templates: arguments are an object, even if the client sent its JSON
    text.
    """
    arguments = call.function.given_arguments
    if arguments_as_text:
        arguments = arguments_text(arguments)
    elif isinstance(arguments, str):
        # Some model wrote it: templates print whatever it is.
        with suppress(ValueError, RecursionError):
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


def draft_of(
    body: ChatBody, prompt: str, grammar: AskedGrammar | None, shown_special: frozenset[str]
) -> Draft:
    is_greedy = body.temperature == 0
    return Draft(
        inputs=prompt,
        add_special_tokens=False,  # the template writes them
        do_sample=not is_greedy,
        is_greedy=is_greedy,
        temperature=None if is_greedy else body.temperature,
        num_choices=1 if body.n is None else body.n,
        one_seed_for_all=True,
        top_k=top_k_of(body.top_k),
        top_p=top_p_of(body.top_p),
        min_p=body.min_p,
        logit_bias=logit_bias_of(body.logit_bias),
        repetition_penalty=body.repetition_penalty,
        output_frequency_penalty=body.frequency_penalty,
        output_presence_penalty=body.presence_penalty,
        max_new_tokens=body.max_tokens if body.max_tokens is not None else body.max_completion_tokens,
        stop=stop_strings(body.stop),
        trim_stop=True,
        shown_special=shown_special,
        ignore_eos=bool(body.ignore_eos),
        seed=body.seed,
        top_n_tokens=body.top_logprobs,
        top_n_field="top_logprobs",
        grammar=grammar,
    )
