"""A client's connection: uvicorn's HTTP protocol, with an end for clients that are too slow.

uvicorn bounds what lies in its buffers and how long a connection may be idle, but waits for ever for the rest
of a header, and for a client to read. Here

- a header must be there in full HEADER_TIMEOUT_S after the connection was made, or after its first byte, and
  have at most MAX_HEADER_BYTES. Bodies have their own deadline where they are read (api/body.py); the rest of
  one that was answered without being read is waited for as long as for a header;
- who leaves so much unread that we have to wait, and goes on so for WRITE_TIMEOUT_S, is disconnected. The
  application notices as it notices any client that goes.

Streams send a piece for every token, to many clients in every step. They get an Outlet, which writes without
what ASGI asks for each message: a coroutine, a dictionary, a look at what was sent before.
"""

import asyncio
from collections.abc import Callable
from typing import Any, cast

import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

OUTLET = "tgi.outlet"  # its name in the scope of a request
HEADER_TIMEOUT_S = 30.0
MAX_HEADER_BYTES = 1 << 16
WRITE_TIMEOUT_S = 60.0

log = structlog.get_logger(__name__)


class Outlet:
    """The way to the client of one response that has begun, and whose length was not told."""

    __slots__ = ("_flow", "_transport", "_write")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        # Not the cycle: its scope holds this, and only the garbage collector would undo that circle.
        self._flow = cycle.flow
        self._transport = cycle.transport
        self._write = cycle.transport.write

    @property
    def is_clear(self) -> bool:
        """Whether the client is there and keeps up. If not, `send` knows how to wait."""
        return not (self._flow.write_paused or self._transport.is_closing())

    def write(self, data: bytes) -> None:
        """A piece of the body; not an empty one, which would end it."""
        self._write(b"%x\r\n%b\r\n" % (len(data), data))

    def abort(self) -> None:
        """Leave the client, with what it has not read."""
        self._transport.abort()


class Connection(HttpToolsProtocol):
    header_timeout_s = HEADER_TIMEOUT_S
    write_timeout_s = WRITE_TIMEOUT_S

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timer: asyncio.TimerHandle | None = None  # runs while a header is awaited
        self._num_header_bytes = 0
        self._has_begun_header = False
        self._rest_timer: asyncio.TimerHandle | None = None  # while the rest of an answered body is
        self._write_timer: asyncio.TimerHandle | None = None  # while the client must read before we go on
        self._close_timer: asyncio.TimerHandle | None = None  # from closing until everything is sent

    # The transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._header_timer = self._after(self.header_timeout_s, self._header_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._header_timer, self._rest_timer, self._write_timer, self._close_timer):
            _cancel(timer)
        super().connection_lost(exc)
        if self.cycle is not None and self.cycle.response_complete:
            self.cycle = None  # type: ignore[assignment]  # as before the first; they hold one another

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._header_timer is not None:
            self._num_header_bytes += len(data)
            if self._num_header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
                self._refuse(b"431 Request Header Fields Too Large")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self._after(self.write_timeout_s, self._reader_is_late)

    def resume_writing(self) -> None:
        _cancel(self._write_timer)
        super().resume_writing()

    # The parser and the application

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._has_begun_header = True
        if self._header_timer is None:
            self._header_timer = self._after(self.header_timeout_s, self._header_is_late)

    def on_headers_complete(self) -> None:
        _cancel(self._header_timer)
        self._header_timer = None
        self._num_header_bytes = 0
        self._has_begun_header = False
        super().on_headers_complete()
        cast(dict[str, object], self.scope)[OUTLET] = Outlet(self.cycle)

    def on_message_complete(self) -> None:
        _cancel(self._rest_timer)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._close()
        elif self.cycle.response_complete and self.cycle.more_body:
            self._rest_timer = self._after(self.header_timeout_s, self._close)

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self._close()

    # What is late

    def _header_is_late(self) -> None:
        if self.transport.is_closing():
            self.transport.abort()
        elif self.cycle is not None and not self.cycle.response_complete:
            # A client that sends requests ahead; its answer comes first.
            self._header_timer = self._after(self.header_timeout_s, self._header_is_late)
        elif self._has_begun_header:
            self._refuse(b"408 Request Timeout")
        else:
            self._close()

    def _reader_is_late(self) -> None:
        unread_bytes = self.transport.get_write_buffer_size()
        log.info("A client does not read, and is disconnected", unread_bytes=unread_bytes)
        self.transport.abort()

    def _refuse(self, status: bytes) -> None:
        self.transport.write(b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        self._close()

    def _close(self) -> None:
        """What lies in the buffer is sent, but not waited for for ever."""
        self.transport.close()
        if self._close_timer is None:
            self._close_timer = self._after(self.write_timeout_s, self.transport.abort)

    def _after(self, delay_s: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        return self.loop.call_later(delay_s, call)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
