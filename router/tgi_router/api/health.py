"""GET /health and its aliases, /info, /v1/models, /metrics: what the server says about itself."""

from starlette.requests import Request
from starlette.responses import Response

from tgi_router.api.replies import JSONReply, openai_error_reply
from tgi_router.errors import Unhealthy, UnknownModel
from tgi_router.generation import Generation
from tgi_router.metrics import CONTENT_TYPE, Metrics
from tgi_router.scheduling.step_loop import StepLoop
from tgi_router.schemas.native import HealthReply, Info
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
        """Nobody is asked and nothing is waited for, so it answers at any load."""
        state: str = self._step_loop.state
        if self._generation.is_draining and state != "dead":
            state = "draining"
        headers = {"x-health-state": state}
        if state in ("ok", "busy"):
            return Response(headers=headers)
        error = Unhealthy()
        return JSONReply(HealthReply(str(error), error.error_type, state), error.status, headers)

    async def info(self, _: Request) -> Response:
        return JSONReply(self._info)

    async def models(self, _: Request) -> Response:
        return JSONReply(self._models)

    async def model(self, request: Request) -> Response:
        model_id = request.path_params["model_id"]
        for model in self._models.data:
            if model.id == model_id:
                return JSONReply(model)
        error = UnknownModel(model_id)
        return openai_error_reply(
            error.status, str(error), error.error_type, param="model", code="model_not_found"
        )

    async def metrics(self, _: Request) -> Response:
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE})
