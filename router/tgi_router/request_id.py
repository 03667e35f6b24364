"""The id by which one HTTP request is known to its client, in the logs, and to whoever cancels it.

It belongs to the task that answers the request and to those it starts: nobody hands it on by hand.
"""

import uuid
from contextvars import ContextVar

MAX_LENGTH = 128

_current: ContextVar[str | None] = ContextVar("request_id", default=None)


def new() -> str:
    return uuid.uuid4().hex


def given(header: str | None) -> str | None:
    """The id that a client chose; None unless it is short and printable ASCII."""
    if header and len(header) <= MAX_LENGTH and header.isascii() and header.isprintable():
        return header
    return None


def enter(request_id: str) -> None:
    """From now on this task works for that request."""
    _current.set(request_id)


def current() -> str:
    """A new one outside of any request."""
    return _current.get() or new()
