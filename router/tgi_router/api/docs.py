"""GET /docs: the published description of the API, as a page that needs nothing from elsewhere."""

from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from tgi_router.api.replies import Handler, JSONReply

PAGE = files("tgi_router.api").joinpath("docs.html").read_text(encoding="utf-8")


async def to_page(_: Request) -> Response:
    return RedirectResponse("docs/")


async def page(_: Request) -> Response:
    return HTMLResponse(PAGE)


def document_of(document: dict[str, Any]) -> Handler:
    async def answer(_: Request) -> Response:
        return JSONReply(document)

    return answer
