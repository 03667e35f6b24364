"""Every way a request can fail: the status and error_type that its client sees, and the label it is counted
under.

`str(error)` is the message for the client. `counted_as` is the `err` label of `tgi_request_failure`, None:
not counted.
"""

import math
from typing import ClassVar

SHORTEST_RETRY_S, LONGEST_RETRY_S = 1, 60


class RequestError(Exception):
    status: ClassVar[int]
    error_type: ClassVar[str]
    counted_as: ClassVar[str | None] = None
    retry_after_s: int | None = None  # whole seconds after which trying again makes sense


class ValidationError(RequestError):
    """The request breaks a rule; the argument is the rule's message."""

    status, error_type, counted_as = 422, "validation", "validation"

    def __str__(self) -> str:
        return f"Input validation error: {self.args[0]}"


class Overloaded(RequestError):
    """More requests than permits."""

    status, error_type, counted_as = 429, "overloaded", "overloaded"

    def __init__(self, retry_after_s: int) -> None:
        super().__init__()
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return "Model is overloaded"


class QueuedTooLong(RequestError):
    """The limit passed before the request was first scheduled; the argument is the limit in seconds.

    Who comes back after as long again finds a queue that has moved on.
    """

    status, error_type, counted_as = 429, "overloaded", "overloaded"

    def __init__(self, limit_s: float) -> None:
        super().__init__(limit_s)
        self.retry_after_s = min(max(math.ceil(limit_s), SHORTEST_RETRY_S), LONGEST_RETRY_S)

    def __str__(self) -> str:
        return (
            "Model is overloaded: the request waited in the queue for longer than `max_queue_time`, "
            f"{self.args[0]:g} seconds"
        )


class ShuttingDown(RequestError):
    """The server drains. `overloaded` is what clients know to send elsewhere or again."""

    status, error_type, counted_as = 503, "overloaded", "overloaded"

    def __str__(self) -> str:
        return "Server is shutting down"


class GenerationFailed(RequestError):
    """The shards could not go on with this sequence; the argument is their message."""

    status, error_type, counted_as = 424, "generation", "generation"

    def __str__(self) -> str:
        return f"Request failed during generation: Server error: {self.args[0]}"


class ShardsUnavailable(GenerationFailed):
    """The shards are away, and the server shuts down rather than wait for them."""

    status = 503


class IncompleteGeneration(RequestError):
    """Something broke that should not: a bug of ours."""

    status, error_type, counted_as = 500, "incomplete_generation", "incomplete"

    def __str__(self) -> str:
        return "Incomplete generation"


class TemplateError(RequestError):
    status, error_type, counted_as = 422, "template_error", "template"

    def __str__(self) -> str:
        return f"Template error: {self.args[0]}"


class ToolError(RequestError):
    status, error_type, counted_as = 422, "tool_error", "validation"

    def __str__(self) -> str:
        return f"Tool error: {self.args[0]}"


class SuffixNotSupported(RequestError):
    status, error_type, counted_as = 422, "suffix not supported", "validation"

    def __str__(self) -> str:
        return "Suffix is not supported and can be achieved by preprocessing the prompt."


class BatchSizeExceeded(RequestError):
    """Too many prompts in one body; the argument is the limit."""

    status, error_type, counted_as = 422, "batch size exceeded", "validation"

    def __str__(self) -> str:
        return f"Number of prompts exceeds the maximum allowed batch size of {self.args[0]}"


class Cancelled(RequestError):
    """Somebody ended the request by its id. OpenAI's routes tell no error: the answer ends where it was."""

    status, error_type = 499, "cancelled"

    def __str__(self) -> str:
        return "Request was cancelled"


class UnknownRequest(RequestError):
    """Nothing runs under this id (any more); the argument is the id."""

    status, error_type = 404, "not_found"

    def __str__(self) -> str:
        return f"No request `{self.args[0]}` is running"


class UnknownModel(RequestError):
    """The argument is the model's name."""

    status, error_type = 404, "not_found"

    def __str__(self) -> str:
        return f"The model `{self.args[0]}` does not exist"


class NoInstances(RequestError):
    """A Vertex body that asks for nothing."""

    status, error_type, counted_as = 422, "Input validation error", "validation"

    def __str__(self) -> str:
        return "Input validation error"


class NotUTF8(RequestError):
    """A KServe input whose bytes are no text; the argument is the decoder's message."""

    status, error_type, counted_as = 422, "utf8", "validation"


class LengthMismatch(RequestError):
    """A KServe body with another number of outputs than of inputs."""

    status, error_type, counted_as = 422, "length mismatch", "validation"

    def __str__(self) -> str:
        return "Inputs and outputs length mismatch"


class Unhealthy(RequestError):
    status, error_type = 503, "healthcheck"

    def __str__(self) -> str:
        return "unhealthy"


class ClientGone(Exception):
    """Nobody reads the answer any more."""


class BodyError(Exception):
    """The body of a request could not be read: not JSON, too long, or of the wrong shape."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
