"""The published description of the API: valid, complete, and true of a server that is asked all sorts."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from openapi_spec_validator import validate
from starlette.routing import Route

from router_app import SETTINGS, running
from tgi_router import app
from tgi_router.api import endpoints
from tgi_router.main import main
from tgi_router.schemas.native import StreamReply
from tgi_router.schemas.openai_chat import ChatCompletionChunk
from tgi_router.schemas.openai_completions import CompletionChunk

KEY = "Sesame"
# A body may have the right shape and still break a rule that no schema tells (what fits into the context,
# fields that exclude one another): the contract's answer is 422 as well. And the tiny vocabulary cannot write
# the JSON that a grammar may ask for: 424.
CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "3xx", "404", "422", "424", "429"]
"""


@contextmanager
def listening(folder: Path, **changes: Any) -> Iterator[str]:
    """The application on a port, in a thread with a loop of its own."""
    stopping: asyncio.Queue[str] = asyncio.Queue()
    ready = threading.Event()
    url = ""

    async def serve() -> None:
        nonlocal url
        async with running(folder, **changes) as router:
            listener = app.bind("127.0.0.1", 0)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            server = app.Server(app.uvicorn_config(router.app.asgi))
            serving = asyncio.create_task(server.serve([listener]))
            ready.set()
            await stopping.get()
            server.should_exit = True
            await serving

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=[serve()])
    thread.start()
    try:
        assert ready.wait(30)
        yield url
    finally:
        loop.call_soon_threadsafe(stopping.put_nowait, "stop")
        thread.join(30)
        loop.close()


@pytest.mark.parametrize("api_key", [None, KEY])
async def test_it_is_valid_and_covers_every_route(tmp_path: Path, api_key: str | None) -> None:
    async with running(tmp_path, api_key=api_key) as router:
        document = (await router.client.get("/api-doc/openapi.json")).json()
        validate(document)
        assert document["info"]["title"] == "Text Generation Inference"
        published = {
            (method.upper(), path) for path, methods in document["paths"].items() for method in methods
        }
        routes = [route for route in router.app.routes if isinstance(route, Route)]
        served = {
            (method, route.path.replace(":path}", "}"))
            for route in routes
            for method in (route.methods or set()) - {"HEAD"}
        }
        assert published == served - {("GET", "/docs")}
        assert ("securitySchemes" in document["components"]) is (api_key is not None)
        assert ("security" in document["paths"]["/generate"]["post"]) is (api_key is not None)
        assert "security" not in document["paths"]["/health"]["get"]


def test_print_schema() -> None:
    result = CliRunner().invoke(main, ["print-schema"])
    assert result.exit_code == 0
    assert json.loads(result.output)["paths"].keys() == {
        row.path.replace(":path}", "}") for row in endpoints.table()
    }
    assert json.loads(app.schema(SETTINGS))["info"]["version"] == app.VERSION


async def test_docs_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    async with running(tmp_path) as router:
        redirect = await router.client.get("/docs")
        assert redirect.is_redirect
        page = await router.client.get(str(redirect.next_request.url) if redirect.next_request else "")
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "../api-doc/openapi.json" in page.text
        assert "http" not in page.text.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("path", "body", "event_type"),
    [
        (
            "/generate_stream",
            {"inputs": "ab", "parameters": {"details": True, "top_n_tokens": 2}},
            StreamReply,
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 2},
            ChatCompletionChunk,
        ),
        ("/v1/completions", {"prompt": "ab", "logprobs": 2, "stream_options": {}}, CompletionChunk),
    ],
)
async def test_events_are_what_the_document_says(
    tmp_path: Path, path: str, body: dict[str, Any], event_type: type[Any]
) -> None:
    async with running(tmp_path) as router:
        body["max_tokens"] = 4
        options = body.get("parameters")
        if options is not None:
            options["max_new_tokens"] = 4
        response = await router.post(path, body | {"stream": True})
        assert response.status_code == 200
        events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        for event in [event for event in events if event != "[DONE]"]:
            read = msgspec.json.decode(event, type=event_type)
            assert json.loads(msgspec.json.encode(read)) == json.loads(event)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--phases", "fuzzing,examples,stateful", "--max-examples", "6"], id="drawn"),
        pytest.param(["--phases", "coverage"], id="exhaustive"),
    ],
)
def test_schemathesis_finds_nothing(tmp_path: Path, arguments: list[str]) -> None:
    """All checks; requests are made from the document and always the same."""
    folder = tmp_path / "server"
    folder.mkdir()
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG)
    changes: dict[str, Any] = {"max_concurrent_requests": 64, "max_total_tokens": 16}
    with listening(folder, api_key=KEY, payload_limit=2_000_000, **changes) as url:
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(config)),
            *("run", f"{url}/api-doc/openapi.json", "--checks", "all", "--workers", "1", *arguments),
            *("--generation-deterministic", "--no-shrink"),
            *("--suppress-health-check", "filter_too_much"),  # of the generator: many ids are no path segment
            *("--no-color", "--header", f"Authorization:Bearer {KEY}"),
        ]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-2000:]
