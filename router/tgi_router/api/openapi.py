"""The OpenAPI document, made of the route table and of the types by which bodies are read and written."""

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from tgi_router.api.endpoints import HTML, JSON, TEXT, Endpoint
from tgi_router.schemas.native import ErrorReply, StreamReply
from tgi_router.schemas.openai import OpenAIErrorReply, OpenAIStreamError
from tgi_router.schemas.vertex import INSTANCE_BODIES

TITLE = "Text Generation Inference"
EVENTS = "text/event-stream"
DONE = "[DONE]"
KEY = "key"  # name of the security scheme
ROOT = "#/components/schemas/"

REASONS = {
    400: "The body is not JSON",
    401: "The key is missing or wrong",
    404: "There is nothing of that name",
    408: "The body did not arrive in time",
    413: "The body is too long",
    415: "The content type is not JSON",
    422: "The body has the wrong shape, or breaks a rule",
    424: "The shards could not go on with the request",
    429: "The server has as many requests as it takes",
    500: "A bug of the server",
    503: "The server cannot generate now",
}
BODY_ERRORS = (400, 408, 413, 415, 422)

COMPUTE_HEADERS = {
    "x-compute-type": "The machine",
    "x-compute-time": "Seconds in all",
    "x-compute-characters": "Characters of the prompt",
    "x-total-time": "Milliseconds in all",
    "x-validation-time": "Milliseconds until the request was queued",
    "x-queue-time": "Milliseconds from then until it ran",
    "x-inference-time": "Milliseconds from then to the end",
    "x-time-per-token": "Milliseconds a token",
    "x-prompt-tokens": "Tokens of the prompt",
    "x-generated-tokens": "Tokens of the answer",
}
STREAM_HEADERS = ("x-compute-type", "x-compute-characters")


def document(rows: Sequence[Endpoint], version: str, *, has_key: bool) -> dict[str, Any]:
    """As JSON-like data. has_key: whether the server asks for one."""
    types = _types(rows)
    schemas, components = msgspec.json.schema_components(
        types, schema_hook=_any_json, ref_template=ROOT + "{name}"
    )
    schema_of = dict(zip(map(_key, types), schemas, strict=True))
    # No type says what an instance may be: it is read in two attempts.
    components["VertexBody"]["properties"]["instances"]["items"] = {
        "anyOf": [schema_of[_key(body)] for body in INSTANCE_BODIES]
    }
    paths: dict[str, Any] = {}
    for row in rows:
        operation = _operation(row, schema_of, has_key=has_key)
        paths.setdefault(_plain(row.path), {})[row.method.lower()] = operation
    security = {"securitySchemes": {KEY: {"type": "http", "scheme": "bearer"}}} if has_key else {}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": TITLE,
            "description": "Text Generation Webserver",
            "version": version,
        },
        "tags": [{"name": family} for family in dict.fromkeys(row.family for row in rows)],
        "paths": paths,
        "components": {"schemas": components} | security,
    }


def _types(rows: Sequence[Endpoint]) -> list[Any]:
    found: list[Any] = [ErrorReply, OpenAIErrorReply, OpenAIStreamError, *INSTANCE_BODIES]
    for row in rows:
        found += [*row.bodies, *row.replies, *row.events]
    return list({_key(one): one for one in found}.values())


def _any_json(of: type) -> dict[str, Any]:
    """The schema of values that we pass on as they are."""
    if of is object:
        return {"description": "any JSON value"}
    raise NotImplementedError(of)


def _key(of: Any) -> str:
    return repr(of)


def _plain(path: str) -> str:
    return path.replace(":path}", "}")


def _operation(row: Endpoint, schema_of: dict[str, Any], *, has_key: bool) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": _operation_id(row),
        "summary": row.summary,
        "tags": [row.family],
    }
    parameters = re.findall(r"{(\w+)}", _plain(row.path))
    if parameters:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for name in parameters
        ]
    if row.bodies:
        schema = _any_of(row.bodies, schema_of)
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    operation["responses"] = _responses(row, schema_of, has_key=has_key)
    if has_key and row.needs_key:
        operation["security"] = [{KEY: []}]
    return operation


def _operation_id(row: Endpoint) -> str:
    """A handler may answer at several paths; the id must tell them apart."""
    from_path = re.sub(r"\W+", "_", row.path).strip("_") or "root"
    return f"{row.name}_{from_path}" if row.is_alias else row.name


def _any_of(types: Sequence[Any], schema_of: dict[str, Any]) -> dict[str, Any]:
    schemas = [schema_of[_key(one)] for one in types]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _responses(row: Endpoint, schema_of: dict[str, Any], *, has_key: bool) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if row.replies:
        content[JSON] = {"schema": _any_of(row.replies, schema_of)}
    elif row.media_type in (TEXT, HTML):
        content[row.media_type] = {"schema": {"type": "string"}}
    if row.events:
        data = _event_data(row, schema_of)
        content[EVENTS] = {"schema": {"type": "object", "properties": {"data": data}, "required": ["data"]}}
    success: dict[str, Any] = {"description": "Success"}
    if content:
        success["content"] = content
    if row.has_compute_headers:
        names = COMPUTE_HEADERS if row.replies else STREAM_HEADERS
        success["headers"] = {
            name: {"description": COMPUTE_HEADERS[name], "schema": {"type": "string"}} for name in names
        }
    responses = {"200": success}
    errors = {status: _error(row, status, schema_of) for status in row.errors}
    if row.bodies:
        errors |= {status: _error(row, status, schema_of) for status in BODY_ERRORS}
    if has_key and row.needs_key:
        errors[401] = {"description": REASONS[401]}
    return responses | {str(status): errors[status] for status in sorted(errors)}


def _event_data(row: Endpoint, schema_of: dict[str, Any]) -> dict[str, Any]:
    """What stands behind `data: ` in one event: JSON, or on OpenAI's routes, at the end, `[DONE]`."""
    has_tgi_events = StreamReply in row.events
    has_openai_events = row.events != (StreamReply,)
    types = [*row.events]
    types += [ErrorReply] if has_tgi_events else []
    types += [OpenAIStreamError] if has_openai_events else []
    data = {"type": "string", "contentMediaType": JSON, "contentSchema": _any_of(types, schema_of)}
    return {"anyOf": [data, {"const": DONE}]} if has_openai_events else data


def _error(row: Endpoint, status: int, schema_of: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if row.has_openai_errors:
        content[JSON] = {"schema": schema_of[_key(OpenAIErrorReply)]}
    else:
        if row.bodies and status in BODY_ERRORS:
            content[TEXT] = {"schema": {"type": "string"}}
        if status in row.errors:
            # Who stands for routes of both families answers like the one that the body is made for.
            shapes = (ErrorReply, OpenAIErrorReply) if len(row.bodies) > 1 else (ErrorReply,)
            content[JSON] = {"schema": _any_of(shapes, schema_of)}
    error: dict[str, Any] = {"description": REASONS[status], "content": content}
    if status == 429:
        error["headers"] = {
            "retry-after": {"description": "Seconds to wait", "schema": {"type": "integer", "minimum": 1}}
        }
    return error
