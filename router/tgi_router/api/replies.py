"""Replies that are not streams: JSON, errors, and the headers that tell how long an answer took."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from tgi_router.errors import BodyError, ClientGone, RequestError
from tgi_router.generation import Run
from tgi_router.metrics import Metrics
from tgi_router.schemas.native import ErrorReply
from tgi_router.schemas.openai import ErrorDetail, OpenAIErrorReply

Handler = Callable[[Request], Awaitable[Response]]

# The words of OpenAI's `error.type` for statuses of which the class alone does not tell.
OPENAI_ERROR_TYPES = {424: "server_error", 429: "rate_limit_error"}

log = structlog.get_logger(__name__)

encode_json = msgspec.json.Encoder().encode


class JSONReply(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode_json(content)


def reply_to(error: RequestError, *, in_openai_shape: bool) -> JSONReply:
    if in_openai_shape:
        reply = openai_error_reply(error.status, str(error), error.error_type)
    else:
        reply = JSONReply(ErrorReply(str(error), error.error_type), error.status)
    if error.retry_after_s is not None:
        reply.headers["retry-after"] = str(error.retry_after_s)
    return reply


def openai_error_reply(status: int, message: str, error_type: str, **more: str) -> JSONReply:
    """more: `param` and `code`, if there is anything to say."""
    kind = OPENAI_ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    detail = ErrorDetail(message, kind, more.get("param"), more.get("code"))
    return JSONReply(OpenAIErrorReply(detail, error_type), status)


def record_failure(metrics: Metrics, error: RequestError, route: str) -> None:
    """Every failure that a client is told of passes here, whether as a status or as a frame of a stream."""
    if error.counted_as is not None:
        metrics.tgi_request_failure.labels(error.counted_as).inc()
    log.error(str(error), route=route, error_type=error.error_type)


def answering_errors(handler: Handler, metrics: Metrics, *, json_body_errors: bool) -> Handler:
    """The handler with every error as its reply.

    json_body_errors: errors have OpenAI's shape, those of unreadable bodies too; else TGI's, and unreadable
    bodies are told in plain text.
    """

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except RequestError as error:
            record_failure(metrics, error, request.url.path)
            return reply_to(error, in_openai_shape=json_body_errors)
        except BodyError as error:
            log.error(str(error), route=request.url.path)
            # Who was too slow sends the rest to nobody: the connection is of no more use.
            headers = {"connection": "close"} if error.status == 408 else {}
            if json_body_errors:
                reply = openai_error_reply(error.status, str(error), "validation")
                reply.headers.update(headers)
                return reply
            return PlainTextResponse(str(error), error.status, headers)
        except ClientGone:
            return Response(status_code=499)  # nobody reads it

    return answer


def compute_headers(runs: Sequence[Run], compute_type: str, num_characters: int) -> dict[str, str]:
    """Of answers that are over: sums over the runs; of each the answer that was given, or the last of those.

    But x-compute-time is what the client waited for all of them, and x-time-per-token is a mean.
    """
    timings = [max(map(run.timings, run.chosen), key=lambda timing: timing.total) for run in runs]
    num_generated = sum(len(answer.token_ids) for run in runs for answer in run.chosen)
    inference_ns = sum(timing.inference for timing in timings)
    return {
        "x-compute-type": compute_type,
        "x-compute-time": seconds_text(max(timing.total for timing in timings)),
        "x-compute-characters": str(num_characters),
        "x-total-time": _milliseconds(sum(timing.total for timing in timings)),
        "x-validation-time": _milliseconds(sum(timing.validation for timing in timings)),
        "x-queue-time": _milliseconds(sum(timing.queue for timing in timings)),
        "x-inference-time": _milliseconds(inference_ns),
        "x-time-per-token": _milliseconds(inference_ns // max(num_generated, 1)),
        "x-prompt-tokens": str(sum(len(run.answers[0].request.prompt_token_ids) for run in runs)),
        "x-generated-tokens": str(num_generated),
    }


def seconds_text(duration_ns: int) -> str:
    """Decimal, without an exponent and without trailing zeros: "0.613492891"."""
    text = f"{duration_ns // 10**9}.{duration_ns % 10**9:09d}"
    return text.rstrip("0").rstrip(".")


def _milliseconds(duration_ns: int) -> str:
    return str(duration_ns // 10**6)
