"""GET /health and its aliases, /info, /v1/models, /metrics: what the server says about itself."""

from starlette.requests import Request
from starlette.responses import Response

from tgi_router.api.replies import JSONReply, error_reply
from tgi_router.errors import Unhealthy
from tgi_router.generation import Generation
from tgi_router.metrics import CONTENT_TYPE, Metrics
from tgi_router.scheduling.step_loop import StepLoop
from tgi_router.schemas.native import Info
from tgi_router.schemas.openai import Model, ModelList


class ServerRoutes:
    def __init__(
        self, step_loop: StepLoop, generation: Generation, metrics: Metrics, info: Info, *, created: int
    ) -> None:
        self._step_loop = step_loop
        self._generation = generation
        self._metrics = metrics
        self._info = info
        self._models = ModelList("list", [Model(info.model_id, "model", created, info.model_id)])

    async def health(self, _: Request) -> Response:
        if self._generation.is_draining or not self._step_loop.is_healthy:
            return error_reply(Unhealthy())
        return Response(status_code=200)

    async def info(self, _: Request) -> Response:
        return JSONReply(self._info)

    async def models(self, _: Request) -> Response:
        return JSONReply(self._models)

    async def metrics(self, _: Request) -> Response:
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE})
