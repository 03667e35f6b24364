"""Where answers leave their news for one reader: a request's response, which may be a stream.

The reader is woken once and takes all that has piled up since.
"""

import asyncio
from collections.abc import Callable

from tgi_router.answer import Answer, GeneratedToken
from tgi_router.errors import ClientGone

MAX_UNREAD = 10_000  # news in a mailbox: minutes of one stream, a few seconds of 128 choices


class Mailbox:
    """Where answers leave their news for one reader.

    A reader that leaves too much of it unread (because its client does not read) has gone, as if the client
    had closed the connection.
    """

    __slots__ = ("_awaits_turn", "_news", "_waiter", "is_closed", "on_overflow")

    def __init__(self) -> None:
        self._news: list[tuple[Answer, GeneratedToken | None]] = []
        self._waiter: asyncio.Future[None] | None = None
        self._awaits_turn = False
        self.is_closed = False
        self.on_overflow: list[Callable[[], None]] = []

    def put(self, answer: Answer, token: GeneratedToken | None) -> None:
        """A token; None: the answer is over, without or after its last token (see Answer.error)."""
        self._news.append((answer, token))
        self.wake()
        if len(self._news) > MAX_UNREAD:
            self.close()
            for end in self.on_overflow:
                end()

    @property
    def has_news(self) -> bool:
        return bool(self._news)

    def wake(self) -> None:
        """The reader looks up, also if there is nothing."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        """The client is gone: the reader gets ClientGone."""
        self.is_closed = True
        self._news.clear()
        self.wake()

    async def take(self) -> list[tuple[Answer, GeneratedToken | None]]:
        """All that came since the last time; empty after a wake() for another reason. Raises ClientGone."""
        if not self._news and not self.is_closed:
            await self._woken()
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

    async def _woken(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
