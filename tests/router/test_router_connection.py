"""Clients that are too slow, at a real server: their headers, their bodies, and their reading."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tiny_tokenizers
from router_app import Running, listening, running
from scripted_shard import ScriptedShard
from tgi_router.api import body as body_reading
from tgi_router.connection import MAX_HEADER_BYTES, Connection
from tgi_router.mailbox import Mailbox

SHORT_S = 0.3
LONG_S = 3600.0
NUM_TOKENS = 4000  # of a stream that is far too long for the buffers on its way


class Hasty(Connection):
    header_timeout_s = SHORT_S
    write_timeout_s = SHORT_S


class HastyReader(Connection):
    """Leaves a client that does not read to the limit of its mailbox."""

    write_timeout_s = LONG_S


@dataclass
class Server:
    router: Running
    port: int

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def answer(self, *pieces: bytes) -> bytes:
        """All that the server says until it closes the connection."""
        reader, writer = await self.connect()
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        try:
            return await reader.read()
        finally:
            writer.close()


@contextlib.asynccontextmanager
async def serving(folder: Path, protocol: type[Connection] = Hasty, **changes: Any) -> AsyncIterator[Server]:
    shard = ScriptedShard(
        vocab_size=tiny_tokenizers.VOCAB_SIZE, num_blocks=1200, max_total_tokens=NUM_TOKENS + 100
    )
    async with running(folder, shard=shard, **changes) as router, listening(router, protocol) as port:
        yield Server(router, port)


def post(path: str, body: bytes, length: int | None = None) -> bytes:
    return (
        b"POST %b HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
        % (path.encode(), len(body) if length is None else length, body)
    )


@pytest.mark.parametrize("begun", [b"", b"GET /health HTT", b"GET /health HTTP/1.1\r\nhost: a\r\nx-slow: "])
async def test_a_header_that_does_not_come_is_not_waited_for(begun: bytes, tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        answer = await server.answer(begun)
        assert answer.startswith(b"HTTP/1.1 408 ") if begun else answer == b""


async def test_neither_is_the_header_of_a_second_request(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        answer = await server.answer(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n", b"GET /health HTTP/1.1\r\n")
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"HTTP/1.1 408 " in answer


async def test_a_client_that_trickles_gains_no_time(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        reader, writer = await server.connect()
        writer.write(b"GET /health HTTP/1.1\r\n")
        reading = asyncio.create_task(reader.read())
        with contextlib.suppress(ConnectionError):
            while not reading.done():
                writer.write(b"a: b\r\n")
                await asyncio.sleep(SHORT_S / 10)
        assert (await reading).startswith(b"HTTP/1.1 408 ")
        writer.close()


async def test_a_header_without_end_is_cut_off(tmp_path: Path) -> None:
    class Patient(Connection):
        header_timeout_s = LONG_S

    async with serving(tmp_path, Patient) as server:
        reader, writer = await server.connect()
        writer.write(b"GET /health HTTP/1.1\r\n")
        reading = asyncio.create_task(reader.read())
        sent = 0
        with contextlib.suppress(ConnectionError):
            while not reading.done():
                assert sent < 100 * MAX_HEADER_BYTES
                writer.write(b"a: %b\r\n" % (b"b" * 1000))
                sent += 1000
                await writer.drain()
                await asyncio.sleep(0)
        with contextlib.suppress(ConnectionError):  # what it still sends may take the answer away
            assert (await reading).startswith(b"HTTP/1.1 431 ")
        writer.close()


async def test_headers_in_time_are_answered_and_the_connection_stays(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        reader, writer = await server.connect()
        for _ in range(3):
            writer.write(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            await asyncio.sleep(1.5 * SHORT_S)  # idle: the business of the keep-alive timeout
        writer.close()


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
async def test_a_body_that_does_not_come_is_not_waited_for(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_reading, "BODY_GRACE_S", SHORT_S)
    monkeypatch.setattr(body_reading, "MIN_BYTES_PER_S", 1e9)
    async with serving(tmp_path) as server:
        answer = await server.answer(post(path, b'{"inputs":', length=1000))
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close\r\n" in answer
        assert b"The request body did not arrive within 0.3 seconds" in answer
        assert server.router.app.generation.permits._num_free == 8


async def test_the_rest_of_a_body_that_nobody_reads_is_not_waited_for(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        answer = await server.answer(post("/no/such/route", b"{", length=1000))
        assert answer.startswith(b"HTTP/1.1 404 ")


STREAMS = (
    ("/generate_stream", {"inputs": "a", "parameters": {"max_new_tokens": NUM_TOKENS}}),
    ("/v1/completions", {"prompt": "a", "max_tokens": NUM_TOKENS, "stream": True, "ignore_eos": True}),
)


@pytest.mark.parametrize(("path", "body"), STREAMS)
async def test_a_client_that_does_not_read_is_disconnected(path: str, body: Any, tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        with socket.socket() as client:
            await read_nothing(server, client, path, body)
            while server.router.app.generation.permits._num_free < 8:  # noqa: ASYNC110  # polled
                await asyncio.sleep(0.02)
            assert not server.router.step_loop._sequences
            with contextlib.suppress(ConnectionError):
                received = await read_all(client)
                assert received.count(b"data: ") < NUM_TOKENS  # the stream ended before its end


async def test_what_a_client_leaves_unread_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its time is up: the sequences end, what lay in the mailbox goes, and the connection too."""
    monkeypatch.setattr("tgi_router.mailbox.MAX_UNREAD", 100)
    mailboxes = []
    init = Mailbox.__init__

    def remember(self: Mailbox, *args: Any) -> None:
        init(self, *args)
        mailboxes.append(self)

    monkeypatch.setattr(Mailbox, "__init__", remember)
    async with serving(tmp_path, HastyReader) as server:
        with socket.socket() as client:
            await read_nothing(server, client, *STREAMS[0])
            while server.router.app.generation.permits._num_free < 8:  # noqa: ASYNC110  # polled
                await asyncio.sleep(0.02)
            assert not server.router.step_loop._sequences
            assert not any(mailbox._news for mailbox in mailboxes)
            shown = server.router.app.generation.metrics.render().decode()
            assert 'tgi_request_failure{err="dropped"} 1\n' in shown
            with contextlib.suppress(ConnectionError):
                received = await read_all(client)
                assert received.count(b"data: ") < NUM_TOKENS


async def read_nothing(server: Server, client: socket.socket, path: str, body: Any) -> None:
    """Ask for a stream and leave it unread; returns when it is under way."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", server.port))
    await loop.sock_sendall(client, post(path, json.dumps(body).encode()))
    while server.router.app.generation.permits._num_free == 8:  # noqa: ASYNC110  # polled
        await asyncio.sleep(0.002)


async def read_all(client: socket.socket) -> bytes:
    received = b""
    while data := await asyncio.get_running_loop().sock_recv(client, 1 << 16):
        received += data
    return received


async def test_a_slow_client_that_reads_gets_everything(tmp_path: Path) -> None:
    """More than fits into the buffers: the server pauses, and goes on."""
    num_tokens = 700
    body = {"inputs": "a", "parameters": {"max_new_tokens": num_tokens}}
    async with serving(tmp_path, Connection) as server:
        with socket.socket() as client:
            await read_nothing(server, client, "/generate_stream", body)
            received = b""
            while not received.endswith(b"0\r\n\r\n"):
                data = await asyncio.get_running_loop().sock_recv(client, 1 << 14)
                assert data
                received += data
            assert received.count(b"data: ") == num_tokens
