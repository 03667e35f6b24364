"""Bodies of /v1/chat/completions."""

from typing import Any

from msgspec import UNSET, Struct, UnsetType

from tgi_router.schemas.grammar import ResponseFormat
from tgi_router.schemas.numbers import Int32, UInt32, UInt64, check_uint64
from tgi_router.schemas.openai import LogitBias, StreamOptions, Usage


class TextPart(Struct, frozen=True, tag_field="type", tag="text"):
    text: str


class ImageURL(Struct, frozen=True):
    url: str


class ImagePart(Struct, frozen=True, tag_field="type", tag="image_url"):
    image_url: ImageURL


class FunctionCall(Struct, frozen=True):
    name: str
    arguments: Any | UnsetType = UNSET
    parameters: Any | UnsetType = UNSET  # the same under its other name
    description: str | None = None

    def __post_init__(self) -> None:
        if (self.arguments is UNSET) == (self.parameters is UNSET):
            raise ValueError("missing or duplicate field `arguments`")

    @property
    def given_arguments(self) -> Any:
        return self.arguments if self.arguments is not UNSET else self.parameters


class ToolCall(Struct, frozen=True):
    id: str
    type: str
    function: FunctionCall


class Message(Struct, frozen=True):
    role: str
    content: str | list[TextPart | ImagePart] | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None
    name: str | None = None
    tool_call_id: Any = None

    def __post_init__(self) -> None:
        if self.content is None and self.tool_calls is None:
            raise ValueError("a message needs `content` or `tool_calls`")


class FunctionDefinition(Struct, frozen=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None  # JSON Schema; none: no arguments
    arguments: dict[str, Any] | None = None  # the same under TGI's other name

    @property
    def given_parameters(self) -> dict[str, Any]:
        given = self.parameters if self.parameters is not None else self.arguments
        return {"type": "object", "properties": {}} if given is None else given


class ToolDefinition(Struct, frozen=True):
    type: str
    function: FunctionDefinition


class FunctionName(Struct, frozen=True):
    name: str


class NamedToolChoice(Struct, frozen=True):
    type: str
    function: FunctionName


class ChatBody(Struct, frozen=True, kw_only=True):
    messages: list[Message]
    model: str | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logprobs: bool | None = None
    top_logprobs: UInt32 | None = None
    max_tokens: UInt32 | None = None
    max_completion_tokens: UInt32 | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: UInt64 | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: UInt32 | None = None
    logit_bias: LogitBias | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: str | NamedToolChoice | None = None  # a string: none, auto, required, or a tool's name
    parallel_tool_calls: bool | None = None
    tool_prompt: str | None = None  # TGI's: what to tell the model about the tools
    # beyond OpenAI
    top_k: Int32 | None = None  # 0 and -1: off
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: str | None = None  # name of one of the model's templates
    documents: list[dict[str, Any]] | None = None  # for the template
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    response_format: ResponseFormat | None = None
    # accepted without effect
    user: Any = None

    def __post_init__(self) -> None:
        check_uint64("seed", self.seed)
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("duplicate field `max_tokens`")

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class TopLogprob(Struct, frozen=True):
    token: str
    logprob: float | None
    bytes: list[int]


class TokenLogprob(Struct, frozen=True):
    token: str
    logprob: float | None
    bytes: list[int]  # of the text that the token adds: joined, they are the answer's
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    content: list[TokenLogprob]


class ReplyFunction(Struct, frozen=True):
    description: None
    name: str
    arguments: str  # JSON text; cut short if the answer was


class ReplyToolCall(Struct, frozen=True):
    id: str
    type: str
    function: ReplyFunction


class ReplyMessage(Struct, frozen=True):
    role: str
    content: str | None  # null: calls, and no words
    tool_calls: list[ReplyToolCall] | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET


class ChatChoice(Struct, frozen=True):
    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatCompletion(Struct, frozen=True):
    object: str
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class DeltaFunction(Struct, frozen=True):
    name: str | None
    arguments: str  # the next piece


class DeltaToolCall(Struct, frozen=True):
    index: int
    id: str  # empty but in a call's first chunk
    type: str
    function: DeltaFunction


class Delta(Struct, frozen=True):
    role: str
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[DeltaToolCall] | UnsetType = UNSET


class ChunkChoice(Struct, frozen=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatCompletionChunk(Struct, frozen=True):
    """One event of a stream."""

    object: str
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None
