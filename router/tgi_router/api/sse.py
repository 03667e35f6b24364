"""Server-sent events: framing, keep-alive comments, and a response that notices when its client has gone."""

import asyncio
from collections.abc import Callable
from typing import Protocol

import msgspec
from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from tgi_router.connection import OUTLET, Outlet
from tgi_router.errors import ClientGone
from tgi_router.mailbox import Mailbox, News

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b":\n\n"
EVENT_HEADERS = {
    "content-type": "text/event-stream",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
KEEP_ALIVE_AFTER_S = 15.0

_encode = msgspec.json.Encoder().encode


def frame(event: object) -> bytes:
    return b"data: " + _encode(event) + b"\n\n"


class ClientWatch:
    """Closes a mailbox when its client goes away. Starts once the body has been read."""

    def __init__(self, receive: Receive, mailbox: Mailbox) -> None:
        self._task = asyncio.create_task(_close_when_gone(receive, mailbox))

    def stop(self) -> None:
        self._task.cancel()


async def _close_when_gone(receive: Receive, mailbox: Mailbox) -> None:
    """No method of the watch: a cancelled task keeps its frames, which would keep the watch and so the task.

    The whole request would hang on that circle, and wait for the garbage collector.
    """
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            mailbox.close()
            return


class Events(Protocol):
    """What a stream tells its client of the news of its answers."""

    @property
    def is_over(self) -> bool:
        """Whether everything has been told."""

    def tell(self, news: News) -> bytes:
        """Whole frames; none if there is nothing to say of it."""


class EventStream(Response):
    """A 200 that tells `events` of the news in `mailbox`.

    on_close runs when the stream is over, however it ends. After 15 s with nothing to say a comment goes out.

    As long as the client keeps up, frames are written to its connection from within the mailbox's shortcut.
    If it does not (or the server has no outlet), they go through `send`, which waits.
    """

    def __init__(
        self,
        events: Events,
        mailbox: Mailbox,
        on_close: Callable[[], None],
        headers: dict[str, str],
        keep_alive_after_s: float = KEEP_ALIVE_AFTER_S,
    ) -> None:
        self.status_code = 200
        self.background: BackgroundTask | None = None
        self._events = events
        self._mailbox = mailbox
        self._on_close = on_close
        self._keep_alive_after_s = keep_alive_after_s
        self.init_headers(EVENT_HEADERS | headers)
        # Its length is not known: the server frames it in chunks.
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        events, mailbox = self._events, self._mailbox
        keep_alive = KeepAlive(mailbox, self._keep_alive_after_s)
        watch = ClientWatch(receive, mailbox)
        outlet: Outlet | None = scope.get(OUTLET)
        shortcut = None
        if outlet is not None:
            shortcut = _WriteThrough(events, mailbox, keep_alive, outlet)
            mailbox.on_overflow.append(outlet.abort)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while not events.is_over:
                news = await mailbox.take(shortcut)
                data = events.tell(news) if news else KEEP_ALIVE
                if data and (news or not events.is_over):  # else the shortcut woke us at the end
                    keep_alive.restart()
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientGone:
            pass  # its sequences are dropped below
        finally:
            keep_alive.stop()
            watch.stop()
            self._on_close()


class _WriteThrough:
    """The shortcut of an EventStream, while its client keeps up."""

    __slots__ = ("_data", "_events", "_keep_alive", "_mailbox", "_outlet")

    def __init__(self, events: Events, mailbox: Mailbox, keep_alive: "KeepAlive", outlet: Outlet) -> None:
        self._events = events
        self._mailbox = mailbox
        self._keep_alive = keep_alive
        self._outlet = outlet
        self._data = b""

    def take(self, news: News) -> bool:
        if not self._outlet.is_clear:
            return False
        self._data = self._events.tell(news)
        return True

    def write(self) -> None:
        if self._data:
            self._outlet.write(self._data)
            self._keep_alive.restart()
        if self._events.is_over:
            self._mailbox.wake()


class KeepAlive:
    """Wakes the reader of a mailbox once `after_s` have passed since the last restart, again and again.

    A restart costs no more than reading the clock: one timer runs, and finds out by itself when it is early.
    """

    def __init__(self, mailbox: Mailbox, after_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._mailbox = mailbox
        self._after_s = after_s
        self._last_at = self._loop.time()
        self._timer = self._loop.call_later(after_s, self._tick)

    def restart(self) -> None:
        self._last_at = self._loop.time()

    def stop(self) -> None:
        self._timer.cancel()

    def _tick(self) -> None:
        idle_s = self._loop.time() - self._last_at
        if idle_s >= self._after_s:
            self._mailbox.wake()
            idle_s = 0.0
        self._timer = self._loop.call_later(self._after_s - idle_s, self._tick)
