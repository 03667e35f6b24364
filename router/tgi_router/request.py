"""What a client asked, checked and resolved: nothing in it can be wrong any more."""

from dataclasses import dataclass
from typing import Literal, Protocol

from msgspec import Struct

from tgi_router.grammar.mask import Grammar

FinishReason = Literal["length", "eos_token", "stop_sequence"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; the meanings are those of `SamplingParameters` in generate.proto."""

    do_sample: bool = False  # False: arg-max
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0  # TGI's: times count / length over prompt and output
    output_frequency_penalty: float = 0.0  # OpenAI's: times the count in the output
    output_presence_penalty: float = 0.0
    watermark: bool = False
    min_p: float = 0.0  # 0: off
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its score), ids distinct
    seed: int = 0  # unsigned 64 bits; always set, drawn by the router when the client gave none


@dataclass(frozen=True, slots=True)
class Request:
    request_id: str
    prompt: str  # as typed, as the chat template rendered it, or the text of the ids that were given
    prompt_token_ids: tuple[int, ...]  # after truncation; at least one
    sampling: Sampling
    max_new_tokens: int  # exact; prompt and output fit into max_total_tokens together
    stop: tuple[str, ...] = ()
    # False (TGI's own routes): the stop text stays, and must end with a token. True (OpenAI): found
    # anywhere, cut off.
    trim_stop: bool = False
    ignore_eos: bool = False
    # With trim_stop: special tokens whose text is shown, because it tells words and calls of tools apart.
    shown_special: frozenset[str] = frozenset()
    top_n_tokens: int = 0
    prompt_logprobs: bool = False
    continues_prompt: bool = True  # False: an encoder read the prompt, and the answer is a text of its own
    grammar: Grammar | None = None  # what the answer must match
    traceparent: str = ""  # W3C trace context that the shards' spans belong to; empty: not traced
    choice: int = 0  # which of several answers to one request this is; part of the key of its draws


class SampledToken(Struct, frozen=True, gc=False):
    """One token as a shard reports it. A Struct, like all that is made for every token: it costs a tenth of a
    frozen dataclass.
    """

    token_id: int
    logprob: float
    top_tokens: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first
    ends_grammar: bool = False  # nothing may follow, and the model has no token that says so


class Listener(Protocol):
    """The reading end of one sequence: told of all that happens to it, in order, on the event loop.

    The scheduling rooms call it and know nothing of text; `generation` implements it. No call may block or
    raise.
    """

    def on_scheduled(self) -> None:
        """The sequence runs in the next plan for the first time (not after a preemption or a recovery)."""

    def on_prompt_logprobs(self, start_position: int, logprobs: list[float]) -> None:
        """Logprobs of the prompt tokens from start_position on; a prompt may arrive in several pieces."""

    def on_token(self, token: SampledToken) -> FinishReason | None:
        """Take one confirmed token. A reason ends the sequence: no call follows."""

    def on_error(self, error: Exception) -> None:
        """The sequence is over without an answer: no call follows."""
