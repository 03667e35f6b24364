"""What the bodies of /v1/completions and /v1/chat/completions have in common. null always means the
default.
"""

from msgspec import Struct


class StreamOptions(Struct, frozen=True):
    include_usage: bool | None = None


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int) -> "Usage":
        return cls(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens)


class Model(Struct, frozen=True):
    id: str
    object: str
    created: int
    owned_by: str


class ModelList(Struct, frozen=True):
    object: str
    data: list[Model]


# Token id, in decimal, -> what is added to its score. TGI took an array and ignored it: so do we.
LogitBias = dict[str, float] | list[float]


class CancelledReply(Struct, frozen=True):
    id: str
    cancelled: bool


class ErrorDetail(Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorReply(Struct, frozen=True):
    """OpenAI's shape, with TGI's `error_type` beside it: each client finds what it looks for."""

    error: ErrorDetail
    error_type: str


class StreamErrorDetail(Struct, frozen=True):
    message: str
    http_status_code: int  # what it would have been, had the stream not begun


class OpenAIStreamError(Struct, frozen=True):
    """An event of a stream that fails."""

    error: StreamErrorDetail
