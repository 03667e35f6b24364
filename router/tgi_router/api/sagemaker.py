"""POST /invocations, SageMaker's one route: hands each body to the route that it is made for."""

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive

from tgi_router.api.body import BodyReader
from tgi_router.api.replies import Handler
from tgi_router.errors import BodyError
from tgi_router.schemas.sagemaker import INVOCATION_BODIES

# The key that says what a body was meant to be, when it is none of the three.
TELLING_KEYS = (b'"inputs"', b'"messages"', b'"prompt"')


class SageMakerRoutes:
    """handlers: of `/`, /v1/chat/completions and /v1/completions. They answer as if they had been called."""

    def __init__(self, handlers: Sequence[Handler], payload_limit: int) -> None:
        readers = [BodyReader(body, payload_limit) for body in INVOCATION_BODIES]
        self._reader = readers[0]
        self._targets = list(zip(TELLING_KEYS, readers, handlers, strict=True))

    async def invocations(self, request: Request) -> Response:
        data = await self._reader.read_bytes(request)
        detail = ""
        for key, reader, handler in self._targets:
            try:
                reader.decode(data)
            except BodyError as error:
                if error.status != 422:
                    raise
                if not detail and key in data:
                    detail = f" ({str(error).partition(': ')[2]})"
            else:
                return await handler(Request(request.scope, _replay(data, request.receive)))
        raise BodyError(
            422,
            "Failed to deserialize the JSON body into the target type: "
            f"data did not match any variant of untagged enum SagemakerRequest{detail}",
        )


def _replay(data: bytes, receive: Receive) -> Receive:
    """The body again, then whatever comes: the client's leaving."""
    is_given = False

    async def next_message() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": data, "more_body": False}

    return next_message
