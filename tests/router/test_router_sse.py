"""A stream of events: comments while there is nothing to tell, and an end when the client goes."""

import asyncio
import gc
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest

from tgi_router.answer import Answer, GeneratedToken
from tgi_router.api.sse import KEEP_ALIVE, ClientWatch, EventStream, frame
from tgi_router.connection import OUTLET
from tgi_router.mailbox import Mailbox, News, Post


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


class Counting:
    """Tells each token's index; over after `last`."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.is_over = False

    def tell(self, news: News) -> bytes:
        tokens = [token for _, token in news if token is not None]
        self.is_over = tokens[-1].index >= self.last
        return b"".join(frame({"n": token.index}) for token in tokens)


class Broken(Counting):
    def tell(self, news: News) -> bytes:
        raise ValueError("cannot be told")


class FakeOutlet:
    def __init__(self, client: Client) -> None:
        self.client = client
        self.is_clear = True
        self.is_aborted = False

    def write(self, data: bytes) -> None:
        self.client.sent.append({"body": data, "way": "outlet"})

    def abort(self) -> None:
        self.is_aborted = True
        self.client.gone.set()


def put(mailbox: Mailbox, *indices: int) -> None:
    for index in indices:
        mailbox.put(ANSWER, GeneratedToken(index, 0, "", "", 0.0, False, ()))


ANSWER = cast(Answer, None)  # nobody here looks at it


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  # polled
        await asyncio.sleep(0.001)


async def test_comments_while_there_is_nothing_to_tell() -> None:
    client, mailbox, closed = Client(), Mailbox(Post()), []
    stream = EventStream(
        Counting(2), mailbox, lambda: closed.append(True), {"x-a": "b"}, keep_alive_after_s=0.02
    )
    put(mailbox, 1)
    serving = asyncio.create_task(stream({}, client.receive, client.send))
    await until(lambda: client.bodies.count(KEEP_ALIVE) == 2 if client.sent else False)
    put(mailbox, 2)
    await serving
    assert client.sent[0]["status"] == 200
    assert (b"x-a", b"b") in client.sent[0]["headers"]
    assert client.bodies[:3] == [b'data: {"n":1}\n\n', KEEP_ALIVE, KEEP_ALIVE]
    assert client.bodies[-2:] == [b'data: {"n":2}\n\n', b""]
    assert [message.get("more_body") for message in client.sent[-2:]] == [True, False]
    assert closed == [True]


@pytest.mark.parametrize("has_outlet", [False, True])
async def test_events_put_the_comment_off(has_outlet: bool) -> None:
    client, mailbox = Client(), Mailbox(Post())
    scope = {OUTLET: FakeOutlet(client)} if has_outlet else {}
    stream = EventStream(Counting(8), mailbox, lambda: None, {}, keep_alive_after_s=0.4)
    serving = asyncio.create_task(stream(scope, client.receive, client.send))
    for index in range(1, 9):
        await asyncio.sleep(0.1)
        put(mailbox, index)
    await serving
    assert KEEP_ALIVE not in client.bodies


async def test_a_client_that_goes_ends_the_stream() -> None:
    client, mailbox, closed = Client(), Mailbox(Post()), []
    stream = EventStream(Counting(2), mailbox, lambda: closed.append(True), {})
    put(mailbox, 1)
    serving = asyncio.create_task(stream({}, client.receive, client.send))
    await until(lambda: len(client.sent) == 2)
    assert not serving.done()
    client.gone.set()
    await serving
    assert closed == [True]
    assert len(client.sent) == 2


async def test_what_a_step_brings_leaves_at_once_and_together() -> None:
    client, mailbox = Client(), Mailbox(Post())
    stream = EventStream(Counting(5), mailbox, lambda: None, {})
    serving = asyncio.create_task(stream({OUTLET: FakeOutlet(client)}, client.receive, client.send))
    await until(lambda: len(client.sent) == 1)
    put(mailbox, 1, 2)
    assert len(client.sent) == 1  # the step loop comes first
    await asyncio.sleep(0)
    assert client.sent[1:] == [{"body": b'data: {"n":1}\n\ndata: {"n":2}\n\n', "way": "outlet"}]
    put(mailbox, 3)
    await asyncio.sleep(0)
    put(mailbox, 4, 5)
    await serving
    assert [message.get("way") for message in client.sent[1:]] == ["outlet", "outlet", "outlet", None]
    assert client.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


async def test_a_client_that_does_not_keep_up_is_waited_for_and_gets_everything_in_order() -> None:
    client, mailbox = Client(), Mailbox(Post())
    outlet, is_writable = FakeOutlet(client), asyncio.Event()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body" and message["more_body"]:
            await is_writable.wait()
        await client.send(message)

    stream = EventStream(Counting(7), mailbox, lambda: None, {})
    serving = asyncio.create_task(stream({OUTLET: outlet}, client.receive, send))
    await until(lambda: len(client.sent) == 1)
    outlet.is_clear = False
    for index in (1, 2, 3):
        put(mailbox, index)
        await asyncio.sleep(0.01)
    assert len(client.sent) == 1
    outlet.is_clear = True
    put(mailbox, 4)  # while the first ones still wait: must not overtake them
    await asyncio.sleep(0.01)
    assert len(client.sent) == 1
    is_writable.set()
    await until(lambda: len(client.sent) == 3)
    put(mailbox, 5)
    await asyncio.sleep(0.01)
    put(mailbox, 6, 7)
    await serving
    assert b"".join(client.bodies) == b"".join(frame({"n": index}) for index in range(1, 8))
    assert [message.get("way") for message in client.sent[1:]] == [None, None, "outlet", "outlet", None]


@pytest.mark.parametrize("has_outlet", [False, True])
async def test_what_cannot_be_told_ends_its_own_stream(has_outlet: bool) -> None:
    client, mailbox, closed = Client(), Mailbox(Post()), []
    scope = {OUTLET: FakeOutlet(client)} if has_outlet else {}
    stream = EventStream(Broken(1), mailbox, lambda: closed.append(True), {})
    serving = asyncio.create_task(stream(scope, client.receive, client.send))
    await until(lambda: len(client.sent) == 1)
    put(mailbox, 1)
    with pytest.raises(ValueError, match="cannot be told"):
        await serving
    assert closed == [True]


async def test_who_leaves_too_much_unread_loses_the_connection_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tgi_router.mailbox.MAX_UNREAD", 3)
    client, mailbox, closed = Client(), Mailbox(Post()), []
    outlet = FakeOutlet(client)

    async def send(message: Any) -> None:
        await client.send(message)
        if message["type"] == "http.response.body":
            await client.gone.wait()

    stream = EventStream(Counting(9), mailbox, lambda: closed.append(True), {})
    serving = asyncio.create_task(stream({OUTLET: outlet}, client.receive, send))
    await until(lambda: len(client.sent) == 1)
    outlet.is_clear = False
    put(mailbox, 1)
    await until(lambda: len(client.sent) == 2)  # and waits for the client
    put(mailbox, 2, 3, 4)
    assert not outlet.is_aborted
    put(mailbox, 5)
    assert outlet.is_aborted
    await serving
    assert closed == [True]


async def test_what_a_watch_held_goes_with_it_and_not_with_the_collector() -> None:
    gc.disable()
    try:
        client = Client()
        alive = weakref.ref(client)
        watch = ClientWatch(client.receive, Mailbox())
        await asyncio.sleep(0)
        watch.stop()
        del watch, client
        for _ in range(3):
            await asyncio.sleep(0)
        assert alive() is None
    finally:
        gc.enable()
