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


# Fields that are parsed only to be refused: silence would give another answer than the one asked for.
LogitBias = dict[str, float] | list[float]


def asks_for_grammar(response_format: dict[str, object] | None) -> bool:
    return response_format is not None and response_format.get("type") != "text"
