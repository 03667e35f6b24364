"""The KServe v2 inference protocol: health, metadata, and generation from UTF-8 bytes."""

from starlette.requests import Request
from starlette.responses import Response

from tgi_router.api.body import BodyReader
from tgi_router.api.native import draft_of
from tgi_router.api.replies import JSONReply, reply_to
from tgi_router.api.sse import ClientWatch
from tgi_router.api.vertex import close_all
from tgi_router.errors import LengthMismatch, NotUTF8, Unhealthy
from tgi_router.generation import Generation, Run
from tgi_router.mailbox import Mailbox
from tgi_router.scheduling.step_loop import StepLoop
from tgi_router.schemas.kserve import (
    InferBody,
    InferInput,
    InferOutput,
    InferReply,
    Live,
    ModelMetadata,
    ServerMetadata,
)
from tgi_router.schemas.native import GenerateBody


class KServeRoutes:
    def __init__(
        self, step_loop: StepLoop, generation: Generation, *, version: str, payload_limit: int
    ) -> None:
        self._step_loop = step_loop
        self._generation = generation
        self._server = ServerMetadata("text-generation-inference", version, ["health", "models", "metrics"])
        self._body = BodyReader(InferBody, payload_limit)

    async def server_metadata(self, _: Request) -> Response:
        return JSONReply(self._server)

    async def live(self, _: Request) -> Response:
        return JSONReply(Live(live=True))

    async def ready(self, _: Request) -> Response:
        if self._generation.is_draining or not self._step_loop.is_healthy:
            return reply_to(Unhealthy(), in_openai_shape=False)
        return JSONReply(Live(live=True))

    async def model_metadata(self, request: Request) -> Response:
        parameters = request.path_params
        return JSONReply(
            ModelMetadata(parameters["model_name"], parameters["model_version"], ["infer", "ready"])
        )

    async def infer(self, request: Request) -> Response:
        self._generation.check_open()
        self._generation.metrics.tgi_request_count.inc()
        started_ns = self._generation.clock_ns()
        body = await self._body.read(request)
        if len(body.inputs) != len(body.outputs):
            raise LengthMismatch
        drafts = [
            draft_of(GenerateBody(inputs=text_of(given), parameters=body.parameters)) for given in body.inputs
        ]
        mailbox = Mailbox()
        watch = ClientWatch(request.receive, mailbox)
        runs: list[Run] = []
        try:
            await self._generation.begin_all(
                drafts, mailbox, runs, streams=False, started_ns=started_ns, route=request.url.path
            )
            await self._generation.finish(runs, mailbox)
            outputs = []
            for output, draft, run in zip(body.outputs, drafts, runs, strict=True):
                prefix = draft.inputs if body.parameters.return_full_text else ""
                data = list((prefix + run.best.generated_text()).encode())
                outputs.append(InferOutput(output.name, (1, len(data)), "BYTES", data))
            return JSONReply(InferReply(body.id, outputs))
        finally:
            watch.stop()
            close_all(runs)


def text_of(given: InferInput) -> str:
    """Raises NotUTF8."""
    try:
        return bytes(given.data).decode()
    except UnicodeDecodeError as error:
        raise NotUTF8(str(error)) from error
