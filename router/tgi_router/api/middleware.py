"""What every request passes on its way in: CORS, its id, the API key. Plain ASGI: nothing is buffered."""

import hmac
from collections.abc import Collection, Mapping, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tgi_router import request_id

VARY = "origin, access-control-request-method, access-control-request-headers"


class CORS:
    """allowed_origins: empty for any."""

    def __init__(self, app: ASGIApp, allowed_origins: Sequence[str]) -> None:
        self._app = app
        self._allowed_origins = frozenset(allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        origin = Headers(scope=scope).get("origin")

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["vary"] = VARY
                if not self._allowed_origins:
                    headers["access-control-allow-origin"] = "*"
                elif origin in self._allowed_origins and origin is not None:
                    headers["access-control-allow-origin"] = origin
            await send(message)

        if scope["method"] == "OPTIONS":
            await send_with_headers(
                {
                    "type": "http.response.start",
                    "status": 200,
                    "headers": [
                        (b"access-control-allow-methods", b"GET,POST"),
                        (b"access-control-allow-headers", b"content-type,authorization"),
                        (b"content-length", b"0"),
                    ],
                }
            )
            await send({"type": "http.response.body", "body": b""})
            return
        await self._app(scope, receive, send_with_headers)


class RequestIds:
    """Every POST gets an id, the client's own if it sent a usable one, and is answered with it.

    silent_paths: their answers tell no id, there is nothing to cancel.
    """

    def __init__(self, app: ASGIApp, silent_paths: Collection[str]) -> None:
        self._app = app
        self._silent_paths = frozenset(silent_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        own_id = request_id.given(Headers(scope=scope).get("x-request-id")) or request_id.new()
        request_id.enter(own_id)
        if scope["path"] in self._silent_paths:
            await self._app(scope, receive, send)
            return

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", own_id.encode())]
            await send(message)

        await self._app(scope, receive, send_with_id)


class APIKey:
    """401 with an empty body for protected (method, path) pairs without `Authorization: Bearer <key>`.

    protected_paths: any method on these needs the key, but for the methods in `open_methods` of that path.
    They may have parameters, as in routes.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_key: str,
        protected_paths: Collection[str],
        open_methods: Mapping[str, Collection[str]],
    ) -> None:
        self._app = app
        self._api_key = api_key.encode()
        self._protected_paths = frozenset(protected_paths)
        self._protected_patterns = [compile_path(path)[0] for path in protected_paths if "{" in path]
        self._open_methods = open_methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._is_protected(scope) and not self._has_key(scope):
            await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
            return
        await self._app(scope, receive, send)

    def _is_protected(self, scope: Scope) -> bool:
        path = scope["path"]
        if path in self._protected_paths:
            return scope["method"] not in self._open_methods.get(path, ())
        return any(pattern.match(path) for pattern in self._protected_patterns)

    def _has_key(self, scope: Scope) -> bool:
        for name, value in scope["headers"]:
            if name == b"authorization":
                scheme, _, key = value.partition(b" ")
                return scheme.lower() == b"bearer" and hmac.compare_digest(key, self._api_key)
        return False
