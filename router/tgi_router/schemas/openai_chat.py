"""Bodies of /v1/chat/completions."""

from typing import Any

from msgspec import UNSET, Struct, UnsetType

from tgi_router.schemas.numbers import UInt32, UInt64, check_uint64
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
    name: str | None = None
    tool_call_id: Any = None

    def __post_init__(self) -> None:
        if self.content is None and self.tool_calls is None:
            raise ValueError("a message needs `content` or `tool_calls`")


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
    # refused unless they ask for nothing
    n: UInt32 | None = None
    logit_bias: LogitBias | None = None
    tools: list[dict[str, object]] | None = None
    tool_choice: str | dict[str, object] | None = None
    response_format: dict[str, object] | None = None

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


class TokenLogprob(Struct, frozen=True):
    token: str
    logprob: float | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    content: list[TokenLogprob]


class ReplyMessage(Struct, frozen=True):
    role: str
    content: str


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
