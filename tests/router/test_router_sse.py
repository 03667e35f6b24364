"""A stream of events: comments while there is nothing to tell, and an end when the client goes."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from tgi_router.api.sse import KEEP_ALIVE, EventStream, frame
from tgi_router.errors import ClientGone
from tgi_router.mailbox import Mailbox


class Client:
    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.gone = asyncio.Event()

    async def receive(self) -> dict[str, str]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.sent[1:]]


async def test_comments_while_there_is_nothing_to_tell() -> None:
    client, mailbox, closed = Client(), Mailbox(), []

    async def frames() -> AsyncIterator[bytes]:
        yield frame({"n": 1})
        for _ in range(2):
            assert await mailbox.take() == []
            yield b""
        yield frame({"n": 2})

    stream = EventStream(
        frames(), mailbox, lambda: closed.append(True), {"x-a": "b"}, keep_alive_after_s=0.02
    )
    await stream({}, client.receive, client.send)
    assert client.sent[0]["status"] == 200
    assert (b"x-a", b"b") in client.sent[0]["headers"]
    assert client.bodies == [b'data: {"n":1}\n\n', KEEP_ALIVE, KEEP_ALIVE, b'data: {"n":2}\n\n', b""]
    assert [message.get("more_body") for message in client.sent[1:]] == [True] * 4 + [False]
    assert closed == [True]


async def test_events_put_the_comment_off() -> None:
    client, mailbox = Client(), Mailbox()

    async def frames() -> AsyncIterator[bytes]:
        for n in range(8):
            await asyncio.sleep(0.01)
            yield frame(n)

    await EventStream(frames(), mailbox, lambda: None, {}, keep_alive_after_s=0.04)(
        {}, client.receive, client.send
    )
    assert KEEP_ALIVE not in client.bodies


async def test_a_client_that_goes_ends_the_stream() -> None:
    client, mailbox, closed, seen = Client(), Mailbox(), [], []

    async def frames() -> AsyncIterator[bytes]:
        yield frame(1)
        try:
            await mailbox.take()
        except ClientGone:
            seen.append("gone")
            raise

    stream = EventStream(frames(), mailbox, lambda: closed.append(True), {})
    serving = asyncio.create_task(stream({}, client.receive, client.send))
    await asyncio.sleep(0.01)
    assert not serving.done()
    client.gone.set()
    await serving
    assert (seen, closed) == (["gone"], [True])
