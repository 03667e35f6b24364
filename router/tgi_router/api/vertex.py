"""POST /vertex, Vertex AI's predict format: several instances, each a native or a chat body."""

from collections.abc import Sequence

from msgspec import Raw
from starlette.requests import Request
from starlette.responses import Response

from tgi_router.api.body import BodyReader
from tgi_router.api.native import draft_of
from tgi_router.api.openai_chat import ChatRoutes
from tgi_router.api.replies import JSONReply
from tgi_router.api.sse import ClientWatch
from tgi_router.errors import BodyError, NoInstances
from tgi_router.generation import Generation, Run
from tgi_router.mailbox import Mailbox
from tgi_router.schemas.native import GenerateBody
from tgi_router.schemas.openai_chat import ChatBody
from tgi_router.schemas.vertex import Predictions, VertexBody
from tgi_router.validation import Draft


class VertexRoutes:
    def __init__(self, generation: Generation, chat: ChatRoutes, *, payload_limit: int) -> None:
        self._generation = generation
        self._chat = chat
        self._body = BodyReader(VertexBody, payload_limit)
        self._native_instance = BodyReader(GenerateBody, payload_limit)
        self._chat_instance = BodyReader(ChatBody, payload_limit)

    async def predict(self, request: Request) -> Response:
        self._generation.check_open()
        self._generation.metrics.tgi_request_count.inc()
        started_ns = self._generation.clock_ns()
        body = await self._body.read(request)
        if not body.instances:
            raise NoInstances
        instances = [self._instance(index, raw) for index, raw in enumerate(body.instances)]
        drafts = [await self._draft(instance) for instance in instances]
        prefixes = [
            instance.inputs
            if isinstance(instance, GenerateBody) and instance.parameters.return_full_text
            else ""
            for instance in instances
        ]
        mailbox = Mailbox()
        watch = ClientWatch(request.receive, mailbox)
        runs: list[Run] = []
        try:
            await self._generation.begin_all(
                drafts, mailbox, runs, streams=False, started_ns=started_ns, route=request.url.path
            )
            await self._generation.finish(runs, mailbox)
            texts = [prefix + run.best.generated_text() for prefix, run in zip(prefixes, runs, strict=True)]
            return JSONReply(Predictions(texts))
        finally:
            watch.stop()
            close_all(runs)

    def _instance(self, index: int, raw: Raw) -> GenerateBody | ChatBody:
        """Raises BodyError."""
        data = bytes(raw)
        try:
            return self._native_instance.decode(data)
        except BodyError as error:
            native_error = error
        try:
            return self._chat_instance.decode(data)
        except BodyError as chat_error:
            meant = chat_error if b'"messages"' in data else native_error
            detail = str(meant).partition(": ")[2]
            raise BodyError(
                422,
                "Failed to deserialize the JSON body into the target type: "
                f"instances[{index}]: data did not match any variant of untagged enum VertexInstance "
                f"({detail})",
            ) from meant

    async def _draft(self, instance: GenerateBody | ChatBody) -> Draft:
        if isinstance(instance, GenerateBody):
            return draft_of(instance)
        return (await self._chat.prepare(instance)).draft


def close_all(runs: Sequence[Run]) -> None:
    for run in runs:
        run.close()
