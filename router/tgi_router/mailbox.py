"""Where answers leave their news for one reader: a request's response, which may be a stream.

A reader is a coroutine that waits in `take`. Waking one costs more than all else about a token, so while it
waits a *shortcut* may take the news in its place, in a plain call:

    Answer -> Mailbox.put … all tokens of a step … Post: each mailbox's shortcut takes, then each one writes

The step loop has done its part by then, and what a step brought for one reader is taken together. All take
before the first writes: the system's calls would push our code and data out of the processor's caches, and
every reader would pay for it (a third of all that a token costs).
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

from tgi_router.answer import Answer, GeneratedToken
from tgi_router.errors import ClientGone

MAX_UNREAD = 10_000  # news in a mailbox: minutes of one stream, a few seconds of 128 choices

News = list[tuple[Answer, GeneratedToken | None]]


class Shortcut(Protocol):
    """What it raises, the reader's `take` raises."""

    def take(self, news: News) -> bool:
        """False: it cannot, and the reader must."""

    def write(self) -> None:
        """What was taken."""


class Post:
    """Brings news to shortcuts, once a step."""

    def __init__(self) -> None:
        self._due: list[Mailbox] = []

    def add(self, mailbox: "Mailbox") -> None:
        if not self._due:
            asyncio.get_running_loop().call_soon(self._deliver)
        self._due.append(mailbox)

    def _deliver(self) -> None:
        due, self._due = self._due, []
        taken = [mailbox for mailbox in due if mailbox.deliver()]
        for mailbox in taken:
            mailbox.write()


class Mailbox:
    """A reader that leaves too much of it unread (because its client does not read) has gone, as if the
    client had closed the connection.

    post: who serves its shortcuts. Without one there are none.
    """

    __slots__ = (
        "_awaits_turn",
        "_is_due",
        "_news",
        "_post",
        "_shortcut",
        "_waiter",
        "is_closed",
        "on_overflow",
    )

    def __init__(self, post: Post | None = None) -> None:
        self._post = post
        self._news: News = []
        self._waiter: asyncio.Future[None] | None = None  # the reader's
        self._shortcut: Shortcut | None = None  # while the reader waits
        self._is_due = False  # at the post
        self._awaits_turn = False
        self.is_closed = False
        self.on_overflow: list[Callable[[], None]] = []

    def put(self, answer: Answer, token: GeneratedToken | None) -> None:
        """A token; None: the answer is over, without or after its last token (see Answer.error)."""
        self._news.append((answer, token))
        if self._shortcut is None or self._post is None:
            self.wake()
        elif not self._is_due:
            self._is_due = True
            self._post.add(self)
        if len(self._news) > MAX_UNREAD:
            self.close()
            for end in tuple(self.on_overflow):  # which may take itself off
                end()

    def wake(self) -> None:
        """The reader looks up, also if there is nothing."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        """The client is gone: the reader gets ClientGone."""
        self.is_closed = True
        self._news.clear()
        self.wake()

    async def take(self, shortcut: Shortcut | None = None) -> News:
        """All that came since the last time; empty after a wake() for another reason. Raises ClientGone.

        shortcut: gets what comes while this waits.
        """
        if not self._news and not self.is_closed:
            self._shortcut = shortcut
            try:
                await self._woken()
            finally:
                self._shortcut = None
        if self.is_closed:
            raise ClientGone
        news, self._news = self._news, []
        return news

    def tell_turn(self) -> None:
        """An answer left the queue: this wakes nobody but who waits for that."""
        if self._awaits_turn:
            self.wake()

    async def turn(self, has_come: Callable[[], bool]) -> None:
        """Until it has; the news stay. Raises ClientGone."""
        self._awaits_turn = True
        while not self.is_closed and not has_come():
            await self._woken()
        self._awaits_turn = False
        if self.is_closed:
            raise ClientGone

    def deliver(self) -> bool:
        """What came goes to the shortcut, unless the reader has been woken or is busy. True: it was taken."""
        self._is_due = False
        waiter, shortcut = self._waiter, self._shortcut
        if waiter is None or shortcut is None or waiter.done() or not self._news:
            return False
        try:
            is_taken = shortcut.take(self._news)
        except Exception as error:
            waiter.set_exception(error)
            return False
        if is_taken:
            self._news = []
        else:
            self.wake()
        return is_taken

    def write(self) -> None:
        """After a successful `deliver`."""
        assert self._shortcut is not None
        try:
            self._shortcut.write()
        except Exception as error:
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_exception(error)

    async def _woken(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
