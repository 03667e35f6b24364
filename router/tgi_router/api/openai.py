"""What the two OpenAI routes share: finish reasons, error frames, the fields that are refused, what a
client is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tgi_router.api.sse import frame
from tgi_router.errors import RequestError, ValidationError
from tgi_router.generation import Answer
from tgi_router.request import FinishReason
from tgi_router.schemas.openai import Usage

FINISH_REASONS: dict[FinishReason, str] = {"length": "length", "eos_token": "stop", "stop_sequence": "stop"}


@dataclass(frozen=True, slots=True)
class Served:
    """How replies name the server."""

    model_name: str
    system_fingerprint: str
    compute_type: str


def finish_reason_of(answer: Answer) -> str:
    """Of an answer that has its last token."""
    assert answer.finish_reason is not None
    return FINISH_REASONS[answer.finish_reason]


def usage_of(answers: Sequence[Answer]) -> Usage:
    return Usage.of(
        sum(len(answer.request.prompt_token_ids) for answer in answers),
        sum(len(answer.token_ids) for answer in answers),
    )


def error_frame(error: RequestError) -> bytes:
    return frame({"error": {"message": str(error), "http_status_code": error.status}})


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


def top_p_of(top_p: float | None) -> float | None:
    """1, OpenAI's default, switches it off."""
    return None if top_p == 1 else top_p
