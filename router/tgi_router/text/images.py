"""An image that a prompt names, brought here. Nothing else of ours connects to where a client says.

A URL is the client's, the network is ours. So a host is resolved once, all of its addresses must be public,
and the connection goes to one of those; each redirect begins anew. Bytes, pixels and time are bounded. The
environment's proxies are not used: they would resolve the name themselves.
"""

import asyncio
import base64
import io
import ipaddress
import socket
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import httpcore
import httpx
from PIL import Image as PillowImage
from PIL import UnidentifiedImageError

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

MAX_REDIRECTS = 10
REDIRECTS = (301, 302, 303, 307, 308)
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF")
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: an IPv4 address in the last four bytes

PillowImage.MAX_IMAGE_PIXELS = None  # it would warn of many: we refuse too many


class ImageUnavailable(Exception):
    """An image cannot be had, or not within the limits; the text is for the client."""


@dataclass(frozen=True, slots=True)
class Limits:
    max_bytes: int = 1 << 30
    max_pixels: int = 100_000_000
    timeout_s: float = 30.0  # for all of it, redirects included


@dataclass(frozen=True, slots=True)
class Image:
    data: bytes  # as it came
    format: str  # one of FORMATS
    width: int
    height: int


def is_public(address: IPAddress) -> bool:
    """Whether anybody on the internet may mean it: not this machine, not its networks."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in NAT64:
            inner = ipaddress.IPv4Address(address.packed[-4:])
        if inner is not None:
            return is_public(inner)
        if address.teredo is not None:
            return False
    return address.is_global and not address.is_multicast


class ImageFetcher:
    def __init__(self, limits: Limits, *, is_allowed: Callable[[IPAddress], bool] = is_public) -> None:
        self._limits = limits
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl.create_default_context(),
            network_backend=_Backend(is_allowed),
            max_keepalive_connections=0,  # the next request resolves anew
        )

    async def fetch(self, url: str) -> Image:
        """Of http://, https:// or data:<type>;base64,<data>. Raises ImageUnavailable."""
        if url.startswith("data:"):
            data = self._inline(url)
        elif url.startswith(("http://", "https://")):
            data = await self._download(url)
        else:
            raise ImageUnavailable(f"invalid image content: {_shortened(url)}")
        return await asyncio.to_thread(self._examined, data)

    async def close(self) -> None:
        await self._pool.aclose()

    def _inline(self, url: str) -> bytes:
        kind, comma, text = url.removeprefix("data:").partition(",")
        if not comma or not kind.endswith(";base64") or kind.count(";") != 1:
            raise ImageUnavailable(f"invalid image content: {_shortened(url)}")
        self._check_size(len(text) // 4 * 3 - text[-2:].count("="))
        try:
            return base64.b64decode(text, validate=True)
        except ValueError as error:
            raise ImageUnavailable(f"base64 encoding is invalid: {error}") from error

    async def _download(self, url: str) -> bytes:
        timeout_s = self._limits.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await self._follow(url)
        except TimeoutError as error:
            raise ImageUnavailable(f"Could not fetch image: it took more than {timeout_s:g} s") from error
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as error:
            raise ImageUnavailable(f"Could not fetch image: {str(error) or type(error).__name__}") from error
        except (httpx.InvalidURL, httpcore.UnsupportedProtocol, UnicodeError) as error:
            raise ImageUnavailable(f"Could not fetch image: invalid URL: {error}") from error

    async def _follow(self, first_url: str) -> bytes:
        url = httpx.URL(first_url)
        for _ in range(MAX_REDIRECTS + 1):
            if url.scheme not in ("http", "https"):
                raise ImageUnavailable("Could not fetch image: a redirect leads to neither http nor https")
            if url.port is not None and not 0 < url.port < 1 << 16:
                raise ImageUnavailable(f"Could not fetch image: invalid URL: port {url.port}")
            # A name and password in the URL are not sent; where they are needed, a status will say so.
            headers: dict[bytes | str, bytes | str] = {"Host": url.netloc, "Accept": "image/*"}
            target = httpcore.URL(
                scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
            )
            async with self._pool.stream("GET", target, headers=headers) as response:
                location = _header(response.headers, b"location")
                if response.status in REDIRECTS and location is not None:
                    url = url.join(location.decode("latin-1"))
                    continue
                if response.status != 200:
                    raise ImageUnavailable(f"Could not fetch image: status {response.status}")
                return await self._read(response)
        raise ImageUnavailable(f"Could not fetch image: more than {MAX_REDIRECTS} redirects")

    async def _read(self, response: httpcore.Response) -> bytes:
        told = _header(response.headers, b"content-length") or b""
        if told.isdigit():
            self._check_size(int(told))
        data = bytearray()
        async for part in response.aiter_stream():
            data += part
            self._check_size(len(data))
        return bytes(data)

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._limits.max_bytes:
            raise ImageUnavailable(
                f"Image size {num_bytes} bytes exceeds maximum allowed size of {self._limits.max_bytes} bytes"
            )

    def _examined(self, data: bytes) -> Image:
        """Only its header is read: no pixel is decoded before their number is known."""
        try:
            with PillowImage.open(io.BytesIO(data), formats=FORMATS) as image:
                found = Image(data, str(image.format), *image.size)
        except UnidentifiedImageError as error:
            raise ImageUnavailable(f"invalid image: it is none of {', '.join(FORMATS)}") from error
        except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for broken headers
            raise ImageUnavailable(f"invalid image: {error}") from error
        if found.width * found.height > self._limits.max_pixels:
            raise ImageUnavailable(
                f"Image of {found.width} x {found.height} pixels exceeds maximum allowed "
                f"{self._limits.max_pixels} pixels"
            )
        return found


class _Backend(httpcore.AsyncNetworkBackend):
    """Connects to what a name's addresses are, if all of them are allowed."""

    def __init__(self, is_allowed: Callable[[IPAddress], bool]) -> None:
        self._is_allowed = is_allowed
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  # the base class's
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore.ConnectError(f"{host} cannot be resolved: {error}") from error
        addresses = [str(address[0]) for *_, address in found]
        for address in addresses:
            if not self._is_allowed(ipaddress.ip_address(address.partition("%")[0])):
                raise ImageUnavailable(f"Could not fetch image: {host} is not a public address")
        last_error: Exception = httpcore.ConnectError(f"{host} has no address")
        for address in addresses:
            try:
                return await self._network.connect_tcp(
                    address, port, timeout=timeout, local_address=local_address, socket_options=socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                last_error = error
        raise last_error

    async def sleep(self, seconds: float) -> None:
        await self._network.sleep(seconds)


def _header(headers: list[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    return next((value for key, value in headers if key.lower() == name), None)


def _shortened(url: str) -> str:
    return url if len(url) <= 100 else f"{url[:100]}..."
