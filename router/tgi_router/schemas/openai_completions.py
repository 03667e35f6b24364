"""Bodies of /v1/completions."""

from msgspec import Struct

from tgi_router.schemas.numbers import UInt32, UInt64, check_uint64
from tgi_router.schemas.openai import LogitBias, StreamOptions, Usage


class CompletionBody(Struct, frozen=True, kw_only=True):
    prompt: str | list[str | int | list[int]]
    model: str | None = None
    max_tokens: UInt32 | None = None
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
    # refused unless they ask for nothing
    n: UInt32 | None = None
    best_of: UInt32 | None = None
    echo: bool | None = None
    logprobs: UInt32 | None = None
    logit_bias: LogitBias | None = None
    response_format: dict[str, object] | None = None

    def __post_init__(self) -> None:
        check_uint64("seed", self.seed)
        if self.prompt == []:
            raise ValueError("prompt: Empty array detected. Do not use an empty array for the prompt.")

    @property
    def prompts(self) -> list[str] | None:
        """None: there are token ids among them."""
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        return texts if len(texts) == len(prompts) else None


class CompletionChoice(Struct, frozen=True):
    index: int
    text: str
    logprobs: None
    finish_reason: str | None


class Completion(Struct, frozen=True):
    object: str
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage
