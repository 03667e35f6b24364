"""Images that prompts name: a real HTTP server beside, on one address that is allowed here."""

import asyncio
import base64
import contextlib
import io
import ipaddress
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from PIL import Image as PillowImage

from tgi_router.text.images import FORMATS, ImageFetcher, ImageUnavailable, IPAddress, Limits, is_public

HERE = ipaddress.ip_address("127.0.0.1")


def picture(width: int = 7, height: int = 5, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    PillowImage.new("RGB", (width, height), "red").save(file, form)
    return file.getvalue()


def reply(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", "connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


@asynccontextmanager
async def serving(replies: dict[str, bytes | None]) -> AsyncIterator[tuple[str, list[str]]]:
    """By path; None: never answers. Yields the server's URL and, as they come, the paths asked for."""
    asked: list[str] = []
    answering: list[asyncio.Task[None] | None] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering.append(asyncio.current_task())
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split(" ")[1]
        asked.append(path)
        if (found := replies[path]) is None:
            await reader.read()
        else:
            writer.write(found)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked
    await asyncio.gather(*filter(None, answering))


@asynccontextmanager
async def fetching(
    is_allowed: Callable[[IPAddress], bool] = lambda address: address == HERE, **limits: float
) -> AsyncIterator[ImageFetcher]:
    fetcher = ImageFetcher(Limits(**limits), is_allowed=is_allowed)  # type: ignore[arg-type]
    try:
        yield fetcher
    finally:
        await fetcher.close()


async def refusal(fetcher: ImageFetcher, url: str) -> str:
    with pytest.raises(ImageUnavailable) as error:
        await fetcher.fetch(url)
    return str(error.value)


@pytest.mark.parametrize("form", FORMATS)
async def test_an_image_comes_over_http_and_inline(form: str) -> None:
    data = picture(form=form)
    async with serving({"/a%20b?c=1": reply(data)}) as (url, _), fetching() as fetcher:
        inline = f"data:image/{form.lower()};base64,{base64.b64encode(data).decode()}"
        for place in (f"{url}/a b?c=1", inline):
            image = await fetcher.fetch(place)
            assert (image.data, image.format, image.width, image.height) == (data, form, 7, 5)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.9.9.9", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0"),
        *("100.64.0.1", "224.0.0.1", "255.255.255.255", "198.18.0.1", "192.0.2.1"),
        *("::1", "::", "fe80::1", "fd00::1", "ff02::1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]"]
)
async def test_nothing_is_asked_of_a_private_address(host: str) -> None:
    async with serving({"/": reply(picture())}) as (url, asked), fetching(is_public) as fetcher:
        port = url.rpartition(":")[2]
        assert "Could not fetch image" in await refusal(fetcher, f"http://{host}:{port}/")
        assert asked == []


async def test_a_name_is_refused_if_any_of_its_addresses_is_private(monkeypatch: pytest.MonkeyPatch) -> None:
    def addresses(*_: object, **__: object) -> list[object]:
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", 80)),
        ]

    monkeypatch.setattr(socket, "getaddrinfo", addresses)
    async with fetching() as fetcher:
        assert await refusal(fetcher, "http://both.example/") == (
            "Could not fetch image: both.example is not a public address"
        )


async def test_a_redirect_is_followed_and_checked_like_the_first_address() -> None:
    replies: dict[str, bytes | None] = {
        "/first": reply(b"", "302 Found", "location: /second"),
        "/second": reply(b"", "307 Temporary Redirect", "location: last"),
        "/last": reply(picture()),
        "/inside": reply(b"", "302 Found", "location: http://127.0.0.2/secret"),
        "/file": reply(b"", "302 Found", "location: file:///etc/passwd"),
        "/round": reply(b"", "302 Found", "location: /round"),
    }
    async with serving(replies) as (url, asked), fetching() as fetcher:
        assert (await fetcher.fetch(f"{url}/first")).width == 7
        assert "127.0.0.2 is not a public address" in await refusal(fetcher, f"{url}/inside")
        assert "neither http nor https" in await refusal(fetcher, f"{url}/file")
        assert "more than 10 redirects" in await refusal(fetcher, f"{url}/round")
        assert asked.count("/round") == 11


async def test_bytes_pixels_and_time_are_bounded() -> None:
    data = picture(100, 100)
    endless = reply(data).replace(b"content-length", b"x-length") + b"x" * 100_000
    bomb = picture(2000, 2000, "GIF")
    replies: dict[str, bytes | None] = {
        "/told": reply(b"x" * 9000),
        "/untold": endless,
        "/bomb": reply(bomb),
        "/never": None,
    }
    async with (
        serving(replies) as (url, _),
        fetching(max_bytes=8000, max_pixels=10_000, timeout_s=0.5) as fetcher,
    ):
        limit = "bytes exceeds maximum allowed size of 8000 bytes"
        assert await refusal(fetcher, f"{url}/told") == f"Image size 9000 {limit}"
        assert limit in await refusal(fetcher, f"{url}/untold")
        inline = f"data:image/png;base64,{base64.b64encode(bytes(8001)).decode()}"
        assert await refusal(fetcher, inline) == f"Image size 8001 {limit}"
        assert "2000 x 2000 pixels exceeds maximum allowed 10000 pixels" in await refusal(
            fetcher, f"{url}/bomb"
        )
        assert "it took more than 0.5 s" in await refusal(fetcher, f"{url}/never")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "invalid image content: file:///etc/passwd"),
        ("data:image/png,abc", "invalid image content"),
        ("data:image/png;a=b;base64,abc", "invalid image content"),
        ("data:image/png;base64,?!", "base64 encoding is invalid"),
        ("data:image/png;base64,\u00e9", "base64 encoding is invalid"),
        ("data:image/png;base64,aGVsbG8=", "invalid image: it is none of PNG, JPEG"),
        (f"data:image/png;base64,{base64.b64encode(picture()[:20]).decode()}", "invalid image"),
        ("http://", "Could not fetch image"),
        ("http://[::1/", "Could not fetch image"),
        ("http://a b/", "Could not fetch image"),
        ("http://127.0.0.1:99999/", "Could not fetch image"),
        ("http://no-such-host.invalid/", "Could not fetch image: no-such-host.invalid cannot be resolved"),
    ],
)
async def test_what_is_no_image_is_refused_with_its_reason(url: str, message: str) -> None:
    async with fetching() as fetcher:
        assert message in await refusal(fetcher, url)


async def test_a_status_and_a_broken_connection_are_told() -> None:
    replies: dict[str, bytes | None] = {
        "/gone": reply(picture(), "404 Not Found"),
        "/short": reply(picture())[:-5],
    }
    async with serving(replies) as (url, _), fetching() as fetcher:
        assert await refusal(fetcher, f"{url}/gone") == "Could not fetch image: status 404"
        assert "Could not fetch image" in await refusal(fetcher, f"{url}/short")
