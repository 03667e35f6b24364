"""Bodies of TGI's own routes: /generate, /generate_stream, /tokenize and POST /.

Optional fields take null where the contract says so and nowhere else. Replies list their keys in the
contract's order.
"""

from typing import Literal

from msgspec import UNSET, Struct, UnsetType, field

from tgi_router.schemas.grammar import Grammar
from tgi_router.schemas.numbers import Int32, UInt32, UInt64, check_uint64


class GenerateParameters(Struct, frozen=True, kw_only=True):
    best_of: UInt64 | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: Int32 | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool = False
    max_new_tokens: UInt32 | None = None
    return_full_text: bool | None = None
    stop: list[str] = field(default_factory=list)
    truncate: UInt64 | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    seed: UInt64 | None = None
    top_n_tokens: UInt32 | None = None
    grammar: Grammar | None = None
    adapter_id: str | None = None

    def __post_init__(self) -> None:
        for name in ("best_of", "truncate", "seed"):
            check_uint64(name, getattr(self, name))


class GenerateBody(Struct, frozen=True, kw_only=True):
    inputs: str
    # Left out is not the same as {}: who sends no parameters at all gets sampling.
    parameters: GenerateParameters = GenerateParameters(do_sample=True)
    stream: bool = False


class PrefillToken(Struct, frozen=True):
    id: int
    text: str
    logprob: float | None


class Token(Struct, frozen=True):
    id: int
    text: str
    logprob: float | None
    special: bool


class BestOfSequence(Struct, frozen=True, kw_only=True):
    generated_text: str
    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | UnsetType = UNSET


class Details(Struct, frozen=True, kw_only=True):
    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    best_of_sequences: list[BestOfSequence] | UnsetType = UNSET
    top_tokens: list[list[Token]] | UnsetType = UNSET


class GenerateReply(Struct, frozen=True):
    generated_text: str
    details: Details | UnsetType = UNSET


class StreamDetails(Struct, frozen=True):
    finish_reason: str
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamReply(Struct, frozen=True, kw_only=True):
    """One event of a stream."""

    index: int  # counts from 1
    token: Token
    top_tokens: list[Token] | UnsetType = UNSET
    generated_text: str | None  # null but for the last event
    details: StreamDetails | None


class TokenizedToken(Struct, frozen=True):
    id: int
    text: str
    start: int  # bytes of the UTF-8 text
    stop: int


class ChatTokenizeReply(Struct, frozen=True):
    tokenize_response: list[TokenizedToken]
    templated_text: str


class ErrorReply(Struct, frozen=True):
    error: str
    error_type: str


class HealthReply(Struct, frozen=True):
    """Of a server that is not healthy."""

    error: str
    error_type: str
    state: str


class Info(Struct, frozen=True, kw_only=True):
    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: Literal["text-generation-router"]
    version: str
    sha: str | None
    docker_label: str | None
