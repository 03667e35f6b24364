"""Server-sent events: framing, keep-alive comments, and a response that notices when its client has gone."""

import asyncio
from collections.abc import AsyncIterator, Callable

import msgspec
from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from tgi_router.errors import ClientGone
from tgi_router.mailbox import Mailbox

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b":\n\n"
# Where the outermost middleware leaves the server's own `send` in the scope. Layers in between look at the
# start of a response; its events, of which there are many, go past them.
SERVER_SEND = "tgi.send"
KEEP_ALIVE_AFTER_S = 15.0

_encode = msgspec.json.Encoder().encode


def frame(event: object) -> bytes:
    return b"data: " + _encode(event) + b"\n\n"


class ClientWatch:
    """Closes a mailbox when its client goes away. Starts once the body has been read."""

    def __init__(self, receive: Receive, mailbox: Mailbox) -> None:
        self._receive = receive
        self._mailbox = mailbox
        self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            message: Message = await self._receive()
            if message["type"] == "http.disconnect":
                self._mailbox.close()
                return

    def stop(self) -> None:
        self._task.cancel()


class EventStream(Response):
    """A 200 whose events come from `frames`, each item one or more whole frames.

    on_close runs when the stream is over, however it ends. Between events the reader of `mailbox` is woken
    every 15 s to make `frames` yield b"": nothing to say, so a comment goes out.
    """

    def __init__(
        self,
        frames: AsyncIterator[bytes],
        mailbox: Mailbox,
        on_close: Callable[[], None],
        headers: dict[str, str],
        keep_alive_after_s: float = KEEP_ALIVE_AFTER_S,
    ) -> None:
        self.status_code = 200
        self.background: BackgroundTask | None = None
        self._frames = frames
        self._mailbox = mailbox
        self._on_close = on_close
        self._keep_alive_after_s = keep_alive_after_s
        self.init_headers(
            {"content-type": "text/event-stream", "cache-control": "no-cache", "x-accel-buffering": "no"}
            | headers
        )
        # Its length is not known: the server frames it in chunks.
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        keep_alive = KeepAlive(self._mailbox, self._keep_alive_after_s)
        watch = ClientWatch(receive, self._mailbox)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            send = scope.get(SERVER_SEND, send)
            async for data in self._frames:
                keep_alive.restart()
                await send({"type": "http.response.body", "body": data or KEEP_ALIVE, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientGone:
            pass  # its sequences are dropped below
        finally:
            keep_alive.stop()
            watch.stop()
            self._on_close()


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
