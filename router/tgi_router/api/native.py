"""TGI's own routes: POST /generate, /generate_stream, /, /tokenize and /chat_tokenize."""

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from tgi_router.answer import Answer, GeneratedToken
from tgi_router.api.body import BodyReader
from tgi_router.api.grammar import asked_grammar
from tgi_router.api.openai_chat import ChatRoutes
from tgi_router.api.replies import JSONReply, compute_headers, encode_json, record_failure
from tgi_router.api.sse import EVENT_HEADERS, ClientWatch, EventStream, frame
from tgi_router.errors import RequestError, ValidationError
from tgi_router.generation import Generation, Run
from tgi_router.mailbox import Mailbox, News
from tgi_router.metrics import Metrics
from tgi_router.schemas.native import (
    BestOfSequence,
    ChatTokenizeReply,
    Details,
    ErrorReply,
    GenerateBody,
    GenerateReply,
    PrefillToken,
    StreamDetails,
    Token,
    TokenizedToken,
)
from tgi_router.schemas.numbers import shortest_float32
from tgi_router.schemas.openai_chat import ChatBody
from tgi_router.text.detokenizer import texts_alone
from tgi_router.text.tokenizer import Tokenizer
from tgi_router.validation import Draft


class NativeRoutes:
    def __init__(
        self,
        generation: Generation,
        tokenizer: Tokenizer,
        chat: ChatRoutes,
        *,
        compute_type: str,
        payload_limit: int,
    ) -> None:
        self._generation = generation
        self._tokenizer = tokenizer
        self._compute_type = compute_type
        self._body = BodyReader(GenerateBody, payload_limit)
        self._chat = chat  # who knows how a chat becomes a prompt
        self._chat_body = BodyReader(ChatBody, payload_limit)

    async def generate(self, request: Request) -> Response:
        started_ns = self._begin()
        body = await self._body.read(request)
        return await self._answer(
            request, body, started_ns, return_full_text=body.parameters.return_full_text is True
        )

    async def generate_stream(self, request: Request) -> Response:
        started_ns = self._begin()
        body = await self._body.read(request)
        return await self._stream(
            request, body, started_ns, return_full_text=body.parameters.return_full_text is True
        )

    async def compat_generate(self, request: Request) -> Response:
        """POST /: the body says whether to stream; the prompt is part of the answer unless it says
        otherwise.
        """
        started_ns = self._begin()
        body = await self._body.read(request)
        return_full_text = body.parameters.return_full_text is not False
        if body.stream:
            return await self._stream(request, body, started_ns, return_full_text=return_full_text)
        return await self._answer(request, body, started_ns, return_full_text=return_full_text, in_array=True)

    async def tokenize(self, request: Request) -> Response:
        body = await self._body.read(request)
        if not body.inputs:
            raise ValidationError("`inputs` cannot be empty")
        return JSONReply(await tokenized(self._tokenizer, body.inputs, add_special_tokens=True))

    async def chat_tokenize(self, request: Request) -> Response:
        self._generation.metrics.tgi_request_count.inc()
        body = await self._chat_body.read(request)
        prompt = (await self._chat.prepare(body)).prompt
        tokens = await tokenized(self._tokenizer, prompt, add_special_tokens=False)
        return JSONReply(ChatTokenizeReply(tokens, prompt))

    def _begin(self) -> int:
        self._generation.check_open()
        self._generation.metrics.tgi_request_count.inc()
        return self._generation.clock_ns()

    async def _answer(
        self,
        request: Request,
        body: GenerateBody,
        started_ns: int,
        *,
        return_full_text: bool,
        in_array: bool = False,
    ) -> Response:
        mailbox = Mailbox()
        watch = ClientWatch(request.receive, mailbox)
        run = None
        try:
            run = await self._generation.begin(
                draft_of(body), mailbox, streams=False, started_ns=started_ns, route=request.url.path
            )
            await self._generation.finish([run], mailbox)
            prefix = body.inputs if return_full_text else ""
            reply = self._reply(run, body, prefix)
            return JSONReply(
                [reply] if in_array else reply,
                headers=compute_headers([run], self._compute_type, len(body.inputs)),
            )
        finally:
            watch.stop()
            if run is not None:
                run.close()

    async def _stream(
        self, request: Request, body: GenerateBody, started_ns: int, *, return_full_text: bool
    ) -> Response:
        headers = {
            "x-compute-type": self._compute_type,
            "x-compute-characters": str(len(body.inputs)),
        }
        mailbox = Mailbox(self._generation.post)
        watch = ClientWatch(request.receive, mailbox)
        route = request.url.path
        try:
            run = await self._generation.begin(
                draft_of(body), mailbox, streams=True, started_ns=started_ns, route=route
            )
        except RequestError as error:
            # The status of a stream is 200: what is wrong with its request is told by an event.
            record_failure(self._generation.metrics, error, route)
            return Response(error_frame(error), headers=EVENT_HEADERS | headers)
        finally:
            watch.stop()
        prefix = body.inputs if return_full_text else ""
        events = _NativeEvents(
            self._tokenizer, self._generation.metrics, prefix, route, has_details=body.parameters.details
        )
        return EventStream(events, mailbox, run.close, headers)

    def _reply(self, run: Run, body: GenerateBody, prefix: str) -> GenerateReply:
        best = run.best
        parameters = body.parameters
        text = prefix + best.generated_text()
        if not (parameters.details or parameters.decoder_input_details):
            return GenerateReply(text)
        assert best.finish_reason is not None
        others: list[BestOfSequence] | UnsetType = UNSET
        if len(run.answers) > 1:
            others = [self._best_of(other, prefix) for other in run.answers if other is not best]
        return GenerateReply(
            text,
            Details(
                finish_reason=best.finish_reason,
                generated_tokens=len(best.tokens),
                seed=best.seed,
                prefill=self._prefill(best),
                tokens=self._tokens(best),
                best_of_sequences=others,
                top_tokens=self._all_top_tokens(best),
            ),
        )

    def _best_of(self, answer: Answer, prefix: str) -> BestOfSequence:
        assert answer.finish_reason is not None
        return BestOfSequence(
            generated_text=prefix + answer.generated_text(),
            finish_reason=answer.finish_reason,
            generated_tokens=len(answer.tokens),
            seed=answer.seed,
            prefill=self._prefill(answer),
            tokens=self._tokens(answer),
            top_tokens=self._all_top_tokens(answer),
        )

    def _prefill(self, answer: Answer) -> list[PrefillToken]:
        """Empty unless asked for and enabled. Nothing precedes the first token: it has no logprob."""
        if not answer.request.prompt_logprobs:
            return []
        logprobs = [None, *(shortest_float32(logprob) for logprob in answer.prompt_logprobs)]
        token_ids = answer.request.prompt_token_ids
        tokenizer = self._tokenizer
        texts = texts_alone(tokenizer.decode, tokenizer.decode_one, tokenizer.special_ids, token_ids)
        return [PrefillToken(*row) for row in zip(token_ids, texts, logprobs, strict=True)]

    def _tokens(self, answer: Answer) -> list[Token]:
        return [
            Token(token.id, token.text, shortest_float32(token.logprob), token.special)
            for token in answer.tokens
        ]

    def _all_top_tokens(self, answer: Answer) -> list[list[Token]] | UnsetType:
        if answer.request.top_n_tokens == 0:
            return UNSET
        return [top_tokens_of(self._tokenizer, token) for token in answer.tokens]


class _NativeEvents:
    """The events of a stream, which has one answer. prefix: what its text begins with."""

    def __init__(
        self, tokenizer: Tokenizer, metrics: Metrics, prefix: str, route: str, *, has_details: bool
    ) -> None:
        self.is_over = False
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._prefix = prefix
        self._route = route
        self._has_details = has_details

    def tell(self, news: News) -> bytes:
        return b"".join([self._event(answer, token) for answer, token in news])

    def _event(self, answer: Answer, token: GeneratedToken | None) -> bytes:
        if token is None:
            self.is_over = True
            assert answer.error is not None
            record_failure(self._metrics, answer.error, self._route)
            return error_frame(answer.error)
        text = details = b"null"
        if answer.ends_with(token):
            self.is_over = True
            text = encode_json(self._prefix + answer.generated_text())
            if self._has_details:
                details = encode_json(_stream_details(answer))
        top_tokens = b""
        if token.top_tokens:
            top_tokens = b',"top_tokens":' + encode_json(top_tokens_of(self._tokenizer, token))
        return _EVENT % (
            token.index,
            token.id,
            encode_json(token.text),
            encode_json(shortest_float32(token.logprob)),
            b"true" if token.special else b"false",
            top_tokens,
            text,
            details,
        )


_EVENT = (
    b'data: {"index":%d,"token":{"id":%d,"text":%b,"logprob":%b,"special":%b}%b'
    b',"generated_text":%b,"details":%b}\n\n'
)


def _stream_details(answer: Answer) -> StreamDetails:
    assert answer.finish_reason is not None
    return StreamDetails(
        answer.finish_reason,
        len(answer.token_ids),
        answer.seed,
        len(answer.request.prompt_token_ids),
    )


def error_frame(error: RequestError) -> bytes:
    return frame(ErrorReply(str(error), error.error_type))


def top_tokens_of(tokenizer: Tokenizer, token: GeneratedToken) -> list[Token]:
    return [
        Token(
            token_id,
            tokenizer.text_of(token_id),
            shortest_float32(logprob),
            token_id in tokenizer.special_ids,
        )
        for token_id, logprob in token.top_tokens
    ]


def draft_of(body: GenerateBody) -> Draft:
    parameters = body.parameters
    return Draft(
        inputs=body.inputs,
        add_special_tokens=True,
        best_of=1 if parameters.best_of is None else parameters.best_of,
        do_sample=parameters.do_sample,
        temperature=parameters.temperature,
        repetition_penalty=parameters.repetition_penalty,
        frequency_penalty=parameters.frequency_penalty,
        top_k=parameters.top_k,
        top_p=parameters.top_p,
        typical_p=parameters.typical_p,
        max_new_tokens=parameters.max_new_tokens,
        stop=tuple(parameters.stop),
        truncate=parameters.truncate,
        watermark=parameters.watermark,
        prompt_logprobs=parameters.decoder_input_details,
        seed=parameters.seed,
        top_n_tokens=parameters.top_n_tokens,
        grammar=asked_grammar(parameters.grammar),
    )


async def tokenized(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[TokenizedToken]:
    """Raises ValidationError."""
    try:
        encoded = await tokenizer.encode(text, add_special_tokens=add_special_tokens, with_offsets=True)
    except Exception as error:  # the tokenizer library raises bare Exception
        raise ValidationError(f"tokenizer error {error}") from error
    byte_at = byte_offsets(text)
    return [
        TokenizedToken(token_id, text[start:stop], byte_at[start], byte_at[stop])
        for token_id, (start, stop) in zip(encoded.token_ids, encoded.offsets, strict=True)
    ]


def byte_offsets(text: str) -> list[int] | range:
    """Index of a character -> index of its first byte in UTF-8; the end included."""
    if text.isascii():
        return range(len(text) + 1)
    offsets = [0]
    for character in text:
        offsets.append(offsets[-1] + len(character.encode()))
    return offsets
