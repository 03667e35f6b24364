"""The route table as data: app.py binds every row to its handler, openapi.py publishes it."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from tgi_router.schemas.kserve import (
    InferBody,
    InferReply,
    Live,
    ModelMetadata,
    ServerMetadata,
)
from tgi_router.schemas.native import (
    ChatTokenizeReply,
    GenerateBody,
    GenerateReply,
    Info,
    StreamReply,
    TokenizedToken,
)
from tgi_router.schemas.openai import CancelledReply, Model, ModelList
from tgi_router.schemas.openai_chat import ChatBody, ChatCompletion, ChatCompletionChunk
from tgi_router.schemas.openai_completions import Completion, CompletionBody, CompletionChunk
from tgi_router.schemas.sagemaker import INVOCATION_BODIES
from tgi_router.schemas.vertex import Predictions, VertexBody

Method = Literal["GET", "POST"]

JSON = "application/json"
TEXT = "text/plain"
HTML = "text/html"
NOTHING = ""

# What can go wrong, beside an unreadable body: a rule broken, shards lost, overload, a bug, shutting down.
GENERATION_ERRORS = (422, 424, 429, 500, 503)
TOKENIZE_ERRORS = (422, 500)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    name: str  # of its handler; spans and the published document call it so
    method: Method
    is_alias: bool = False  # another path of a handler that has one
    path: str  # `{name}` and `{name:path}` stand for parameters
    summary: str
    family: str
    needs_key: bool = False  # when the server has one
    bodies: tuple[Any, ...] = ()  # types of the JSON body: it is one of these
    replies: tuple[Any, ...] = ()  # types of the answer in one piece: it is one of these
    media_type: str = JSON  # of that answer, if it has none of these types
    events: tuple[Any, ...] = ()  # types of one event, if the answer can be a stream
    errors: tuple[int, ...] = ()  # statuses that the handler answers, beside those of unreadable bodies
    has_openai_errors: bool = False  # in OpenAI's shape; else in TGI's, and unreadable bodies in plain text
    has_compute_headers: bool = False


def _generating(**row: Any) -> Endpoint:
    return Endpoint(method="POST", needs_key=True, errors=GENERATION_ERRORS, **row)


ENDPOINTS: tuple[Endpoint, ...] = (
    _generating(
        name="compat_generate",
        path="/",
        summary="Generate in one piece, in an array, or as a stream, as `stream` says",
        family="TGI",
        bodies=(GenerateBody,),
        replies=(list[GenerateReply],),
        events=(StreamReply,),
        has_compute_headers=True,
    ),
    _generating(
        name="generate",
        path="/generate",
        summary="Generate in one piece",
        family="TGI",
        bodies=(GenerateBody,),
        replies=(GenerateReply,),
        has_compute_headers=True,
    ),
    _generating(
        name="generate_stream",
        path="/generate_stream",
        summary="Generate as a stream of server-sent events, one a token",
        family="TGI",
        bodies=(GenerateBody,),
        events=(StreamReply,),
        has_compute_headers=True,
    ),
    Endpoint(
        name="tokenize",
        method="POST",
        path="/tokenize",
        summary="The tokens of `inputs`",
        family="TGI",
        needs_key=True,
        bodies=(GenerateBody,),
        replies=(list[TokenizedToken],),
        errors=TOKENIZE_ERRORS,
    ),
    Endpoint(
        name="chat_tokenize",
        method="POST",
        path="/chat_tokenize",
        summary="The prompt that the chat template makes of a chat body, and its tokens",
        family="TGI",
        needs_key=True,
        bodies=(ChatBody,),
        replies=(ChatTokenizeReply,),
        errors=TOKENIZE_ERRORS,
    ),
    _generating(
        name="chat_completions",
        path="/v1/chat/completions",
        summary="Answer a chat",
        family="OpenAI",
        bodies=(ChatBody,),
        replies=(ChatCompletion,),
        events=(ChatCompletionChunk,),
        has_openai_errors=True,
        has_compute_headers=True,
    ),
    _generating(
        name="completions",
        path="/v1/completions",
        summary="Complete one prompt or several",
        family="OpenAI",
        bodies=(CompletionBody,),
        replies=(Completion,),
        events=(CompletionChunk,),
        has_openai_errors=True,
        has_compute_headers=True,
    ),
    Endpoint(
        name="openai_get_model_info",
        method="GET",
        path="/v1/models",
        summary="The model that is served",
        family="OpenAI",
        replies=(ModelList,),
    ),
    Endpoint(
        name="openai_get_model",
        method="GET",
        path="/v1/models/{model_id:path}",
        summary="One model",
        family="OpenAI",
        replies=(Model,),
        errors=(404,),
        has_openai_errors=True,
    ),
    Endpoint(
        name="cancel_request",
        method="POST",
        path="/v1/requests/{request_id:path}/cancel",
        summary="End what runs under an id, which generating routes tell as `x-request-id`",
        family="OpenAI",
        needs_key=True,
        replies=(CancelledReply,),
        errors=(404,),
        has_openai_errors=True,
    ),
    _generating(
        name="sagemaker_compatibility",
        path="/invocations",
        summary="For SageMaker: the body of `/`, `/v1/chat/completions` or `/v1/completions`",
        family="Clouds",
        bodies=INVOCATION_BODIES,
        replies=(list[GenerateReply], ChatCompletion, Completion),
        events=(StreamReply, ChatCompletionChunk, CompletionChunk),
        has_compute_headers=True,
    ),
    _generating(
        name="vertex_compatibility",
        path="/vertex",
        summary="For Vertex AI: several bodies of `/generate` or `/v1/chat/completions`",
        family="Clouds",
        bodies=(VertexBody,),
        replies=(Predictions,),
    ),
    Endpoint(
        name="kserve_server_metadata",
        method="GET",
        path="/v2",
        summary="KServe v2: what the server is",
        family="KServe",
        replies=(ServerMetadata,),
    ),
    Endpoint(
        name="kserve_health_live",
        method="GET",
        path="/v2/health/live",
        summary="KServe v2: whether the server runs",
        family="KServe",
        replies=(Live,),
    ),
    Endpoint(
        name="kserve_health_ready",
        method="GET",
        path="/v2/health/ready",
        summary="KServe v2: whether the server can generate",
        family="KServe",
        replies=(Live,),
        errors=(503,),
    ),
    Endpoint(
        name="kserve_model_metadata",
        method="GET",
        path="/v2/models/{model_name:path}/versions/{model_version}",
        summary="KServe v2: what the model is",
        family="KServe",
        replies=(ModelMetadata,),
    ),
    Endpoint(
        name="kserve_model_ready",
        method="GET",
        path="/v2/models/{model_name:path}/versions/{model_version}/ready",
        summary="KServe v2: whether the model can generate",
        family="KServe",
        replies=(Live,),
        errors=(503,),
    ),
    _generating(
        name="kserve_model_infer",
        path="/v2/models/{model_name:path}/versions/{model_version}/infer",
        summary="KServe v2: generate from UTF-8 bytes",
        family="KServe",
        bodies=(InferBody,),
        replies=(InferReply,),
    ),
    Endpoint(
        name="health",
        method="GET",
        path="/health",
        summary="Whether the server can generate",
        family="Server",
        media_type=NOTHING,
        errors=(503,),
    ),
    Endpoint(
        name="get_model_info",
        method="GET",
        path="/info",
        summary="The model, the limits and the version",
        family="Server",
        replies=(Info,),
    ),
    Endpoint(
        name="metrics",
        method="GET",
        path="/metrics",
        summary="Metrics for Prometheus",
        family="Server",
        media_type=TEXT,
    ),
    Endpoint(
        name="docs",
        method="GET",
        path="/docs/",
        summary="This document as a page",
        family="Server",
        media_type=HTML,
    ),
    Endpoint(
        name="openapi",
        method="GET",
        path="/api-doc/openapi.json",
        summary="This document",
        family="Server",
        replies=(dict[str, object],),
    ),
)


def table(vertex_predict_path: str | None = None, vertex_health_path: str | None = None) -> list[Endpoint]:
    """Every route of a server: the rows above, their other names, and the paths that Vertex AI chose.

    A chosen path that is taken for its method already stays what it is.
    """
    rows = {(endpoint.method, endpoint.path): endpoint for endpoint in ENDPOINTS}
    by_name = {endpoint.name: endpoint for endpoint in ENDPOINTS}
    for name, path in (
        ("health", "/"),
        ("health", "/ping"),
        ("vertex_compatibility", vertex_predict_path),
        ("health", vertex_health_path),
    ):
        if path is not None:
            endpoint = by_name[name]
            rows.setdefault((endpoint.method, path), replace(endpoint, path=path, is_alias=True))
    return list(rows.values())
