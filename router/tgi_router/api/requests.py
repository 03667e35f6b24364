"""POST /v1/requests/{id}/cancel: end what runs under an id. Generating routes tell it as `x-request-id`."""

from starlette.requests import Request
from starlette.responses import Response

from tgi_router.api.replies import JSONReply
from tgi_router.generation import Generation
from tgi_router.schemas.openai import CancelledReply


class RequestRoutes:
    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    async def cancel(self, request: Request) -> Response:
        """Its sequences leave at the next plan. Raises UnknownRequest."""
        request_id = request.path_params["request_id"]
        self._generation.cancel(request_id)
        return JSONReply(CancelledReply(request_id, cancelled=True))
