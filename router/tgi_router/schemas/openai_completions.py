"""Bodies of /v1/completions."""

from typing import Any

from msgspec import UNSET, Struct, UnsetType

from tgi_router.schemas.grammar import ResponseFormat
from tgi_router.schemas.numbers import Int32, UInt32, UInt64, check_uint64
from tgi_router.schemas.openai import LogitBias, StreamOptions, Usage


class CompletionBody(Struct, frozen=True, kw_only=True):
    prompt: str | list[str | int | list[int]]
    model: str | None = None
    max_tokens: UInt32 | None = None
    max_completion_tokens: UInt32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: UInt64 | None = None
    suffix: str | None = None
    stop: str | list[str] | None = None
    n: UInt32 | None = None
    best_of: UInt32 | None = None
    echo: bool | None = None
    logprobs: UInt32 | None = None
    logit_bias: LogitBias | None = None
    # beyond OpenAI
    top_k: Int32 | None = None  # 0 and -1: off
    min_p: float | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    # accepted without effect
    user: Any = None

    def __post_init__(self) -> None:
        check_uint64("seed", self.seed)
        if self.prompt == []:
            raise ValueError("prompt: Empty array detected. Do not use an empty array for the prompt.")
        if isinstance(self.prompt, list) and len({isinstance(one, int) for one in self.prompt}) > 1:
            raise ValueError(
                "prompt: Token ids and texts do not mix. Put the ids into an array of their own."
            )
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("duplicate field `max_tokens`")

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """Each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [tuple(one for one in self.prompt if isinstance(one, int))]
        return [tuple(one) if isinstance(one, list) else str(one) for one in self.prompt]


class CompletionLogprobs(Struct, frozen=True):
    """Four lists with an entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None]  # the token itself is always among them
    text_offset: list[int]  # in characters of the choice's text


class CompletionChoice(Struct, frozen=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class Completion(Struct, frozen=True):
    object: str
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(Struct, frozen=True):
    """One event of a stream."""

    object: str
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
