"""The body of a POST, read within the payload limit and decoded into its type. Raises BodyError."""

import asyncio
import json
import re
from typing import Any, Generic, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from tgi_router.errors import BodyError, ClientGone

# A body is waited for as long as the largest one takes at this speed, and a while longer.
BODY_GRACE_S = 60.0
MIN_BYTES_PER_S = 65_536.0

T = TypeVar("T", bound=msgspec.Struct)

_JSON_TYPE = re.compile(r"application/(json|[^;\s]+\+json)\s*(;|$)", re.IGNORECASE)
_PLACE = re.compile(r"^(?P<message>.*) - at `\$\.?(?P<path>.*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(\w+)`$")


class BodyReader(Generic[T]):
    """For one type of body. Made once per route."""

    def __init__(self, body_type: type[T], payload_limit: int) -> None:
        self._decoder = msgspec.json.Decoder(body_type)
        self._payload_limit = payload_limit
        fields = msgspec.structs.fields(body_type)
        self._names = {field.encode_name for field in fields}
        # Objects inside the body whose fields are ours too.
        self._nested_names = {
            field.encode_name: {inner.encode_name for inner in msgspec.structs.fields(field.type)}
            for field in fields
            if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct)
        }
        self._quoted_names = [
            f'"{name}"'.encode() for name in self._names.union(*self._nested_names.values())
        ]

    async def read(self, request: Request) -> T:
        return self.decode(await self.read_bytes(request))

    async def read_bytes(self, request: Request) -> bytes:
        if not _JSON_TYPE.match(request.headers.get("content-type", "").strip()):
            raise BodyError(415, "Expected request with `Content-Type: application/json`")
        chunks = []
        num_bytes = 0
        timeout_s = BODY_GRACE_S + self._payload_limit / MIN_BYTES_PER_S
        try:
            async with asyncio.timeout(timeout_s):
                async for chunk in request.stream():
                    num_bytes += len(chunk)
                    # What is too much is read to its end but not kept: closing a connection that still sends
                    # would take the answer away from the client. Only one that never ends is cut off.
                    if num_bytes <= self._payload_limit:
                        chunks.append(chunk)
                    else:
                        chunks.clear()
                    if num_bytes > 16 * self._payload_limit:
                        break
        except ClientDisconnect as error:
            raise ClientGone from error
        except TimeoutError as error:
            message = f"The request body did not arrive within {timeout_s:.4g} seconds"
            raise BodyError(408, message) from error
        if num_bytes > self._payload_limit:
            raise BodyError(413, "Failed to buffer the request body: length limit exceeded")
        return b"".join(chunks)

    def decode(self, data: bytes) -> T:
        """Bytes after the first complete JSON value are ignored."""
        try:
            body = self._decode_first_value(data)
            # A name that stands there once cannot be a duplicate; for others it takes a closer look.
            if any(data.count(name) > 1 for name in self._quoted_names):
                self._reject_duplicates(data)
        except msgspec.ValidationError as error:
            raise _wrong_shape(_readable(str(error))) from error
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise BodyError(400, f"Failed to parse the request body as JSON: {error}") from error
        return body

    def _decode_first_value(self, data: bytes) -> T:
        try:
            return self._decoder.decode(data)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError as error:
            if "trailing characters" not in str(error):
                raise
            text = data.decode().lstrip()
            _, end = json.JSONDecoder().raw_decode(text)
            return self._decoder.decode(text[:end])

    def _reject_duplicates(self, data: bytes) -> None:
        top, _ = json.JSONDecoder(object_pairs_hook=_Pairs).raw_decode(data.decode().lstrip())
        _check_unique(top, self._names, "")
        for name, value in top:
            if name in self._nested_names and isinstance(value, _Pairs):
                _check_unique(value, self._nested_names[name], f"{name}: ")


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as it was written."""


def _check_unique(pairs: _Pairs, names: set[str], place: str) -> None:
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen and name in names:
            raise _wrong_shape(f"{place}duplicate field `{name}`")
        seen.add(name)


def _wrong_shape(detail: str) -> BodyError:
    return BodyError(422, f"Failed to deserialize the JSON body into the target type: {detail}")


def _readable(message: str) -> str:
    """msgspec's message with the field in front: `parameters.top_k: Expected `int`, got `str``."""
    path = ""
    if (place := _PLACE.match(message)) is not None:
        message, path = place["message"], place["path"]
    if (missing := _MISSING.match(message)) is not None:
        message = f"missing field `{missing[1]}`"
    return f"{path}: {message}" if path else message
