"""What the two OpenAI routes share: finish reasons, error frames, the fields that are refused, what a
client is.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tgi_router.answer import Answer
from tgi_router.api.sse import frame
from tgi_router.errors import RequestError, ValidationError
from tgi_router.generation import Run
from tgi_router.request import FinishReason
from tgi_router.schemas.openai import LogitBias, OpenAIStreamError, StreamErrorDetail, Usage

_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")

FINISH_REASONS: dict[FinishReason, str] = {"length": "length", "eos_token": "stop", "stop_sequence": "stop"}


@dataclass(frozen=True, slots=True)
class Served:
    """How replies name the server."""

    model_name: str
    system_fingerprint: str
    compute_type: str


def finish_reason_of(answer: Answer) -> str:
    """Of an answer that has its last token, or was cancelled."""
    if answer.is_cancelled:
        return "stop"  # of OpenAI's words the one that blames neither the limit nor the content
    assert answer.finish_reason is not None
    return FINISH_REASONS[answer.finish_reason]


def usage_of(runs: Sequence[Run]) -> Usage:
    """A prompt counts once, whatever the number of its answers; an answer that was not chosen counts too."""
    return Usage.of(
        sum(len(run.answers[0].request.prompt_token_ids) for run in runs),
        sum(len(answer.token_ids) for run in runs for answer in run.answers),
    )


def error_frame(error: RequestError) -> bytes:
    return frame(OpenAIStreamError(StreamErrorDetail(str(error), error.status)))


def refuse(**asked: Any) -> None:
    """Fields that would change the answer, had we implemented them: name=value, false or empty if all is
    well.
    """
    for name, value in asked.items():
        if value:
            raise ValidationError(f"`{name}` is not supported")


def stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def logit_bias_of(logit_bias: LogitBias | None) -> dict[int, float] | None:
    """Raises ValidationError."""
    if not isinstance(logit_bias, dict):
        return None
    for key in logit_bias:
        if not _TOKEN_ID.fullmatch(key):
            raise ValidationError(f"the keys of `logit_bias` must be token ids. Given: `{key}`")
    return {int(key): value for key, value in logit_bias.items()}


def top_k_of(top_k: int | None) -> int | None:
    """0 and -1 switch it off, as elsewhere beyond TGI."""
    return None if top_k in (0, -1) else top_k


def top_p_of(top_p: float | None) -> float | None:
    """1, OpenAI's default, switches it off."""
    return None if top_p == 1 else top_p
