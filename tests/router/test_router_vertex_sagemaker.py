"""The clouds' routes: each answers what the route behind it would."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from router_app import running
from tgi_router.main import main

NATIVE: dict[str, Any] = {"inputs": "the one", "parameters": {"max_new_tokens": 6}}
CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 6,
    "temperature": 0,
}
COMPLETION: dict[str, Any] = {"prompt": "the one", "max_tokens": 6, "temperature": 0}
TARGETS = (("/", NATIVE), ("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION))
CHANGING = ("x-compute-time", "x-request-id", "x-total-time", "x-validation-time", "x-queue-time")
CHANGING += ("x-inference-time", "x-time-per-token", "content-length")


def lasting(value: Any) -> Any:
    """Without what differs between two calls."""
    if isinstance(value, dict):
        return {key: lasting(inner) for key, inner in value.items() if key not in ("id", "created")}
    return [lasting(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("path", "body"), TARGETS)
async def test_invocations_are_the_route_behind(tmp_path: Path, path: str, body: dict[str, Any]) -> None:
    async with running(tmp_path) as router:
        for change in ({}, {"stream": True}, {"max_tokens": 0, "parameters": {"max_new_tokens": 0}}):
            ours = await router.post("/invocations", body | change)
            theirs = await router.post(path, body | change)
            assert ours.status_code == theirs.status_code
            if change.get("stream"):
                assert ours.headers["content-type"] == "text/event-stream"
                assert ours.text.count("data: ") == theirs.text.count("data: ")
                assert ("[DONE]" in ours.text) == ("[DONE]" in theirs.text)
            else:
                assert lasting(ours.json()) == lasting(theirs.json())
            for headers in (ours.headers, theirs.headers):
                for name in CHANGING:
                    headers.pop(name, None)
            assert dict(ours.headers) == dict(theirs.headers)


async def test_invocations_that_fit_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as router:
        response = await router.post("/invocations", {"text": "a"})
        assert response.status_code == 422
        assert response.text.endswith("data did not match any variant of untagged enum SagemakerRequest")
        response = await router.post("/invocations", {"inputs": "a", "parameters": {"top_k": "a"}})
        assert response.status_code == 422
        assert "(parameters.top_k: " in response.text
        response = await router.client.post("/invocations", content=b"{}")
        assert response.status_code == 415
        response = await router.client.post(
            "/invocations", content=b"{", headers={"content-type": "application/json"}
        )
        assert response.status_code == 400


async def test_vertex_honours_parameters(tmp_path: Path) -> None:
    async with running(tmp_path) as router:
        native = (await router.post("/generate", NATIVE)).json()["generated_text"]
        chat = (await router.post("/v1/chat/completions", CHAT)).json()
        text = chat["choices"][0]["message"]["content"]
        full = {"inputs": "the one", "parameters": {"max_new_tokens": 6, "return_full_text": True}}
        response = await router.post("/vertex", {"instances": [NATIVE, CHAT, full]})
        assert response.json() == {"predictions": [native, text, "the one" + native]}
        assert not [name for name in response.headers if name.startswith("x-") and name != "x-request-id"]


async def test_vertex_tells_what_went_wrong(tmp_path: Path) -> None:
    async with running(tmp_path, max_concurrent_requests=2) as router:
        response = await router.post("/vertex", {"instances": []})
        assert response.status_code == 422
        assert response.json() == {"error": "Input validation error", "error_type": "Input validation error"}
        bad = {"inputs": "a", "parameters": {"top_p": 1.0}}
        response = await router.post("/vertex", {"instances": [NATIVE, bad]})
        assert response.status_code == 422
        assert response.json()["error_type"] == "validation"
        assert (await router.post("/vertex", {"instances": [NATIVE] * 3})).status_code == 429
        assert (await router.post("/vertex", {"instances": [NATIVE] * 2})).status_code == 200
        response = await router.post("/vertex", {"instances": [NATIVE, {"text": "a"}]})
        assert response.status_code == 422
        assert "instances[1]: data did not match any variant" in response.text


async def test_paths_that_vertex_chose(tmp_path: Path) -> None:
    chosen = {"vertex_predict_path": "/predict/me:now", "vertex_health_path": "/are/you/there"}
    async with running(tmp_path, api_key="Sesame", **chosen) as router:
        assert (await router.client.get("/are/you/there")).status_code == 200
        assert (await router.post("/predict/me:now", {"instances": [NATIVE]})).status_code == 401
        headers = {"authorization": "Bearer Sesame"}
        response = await router.post("/predict/me:now", {"instances": [NATIVE]}, headers=headers)
        assert len(response.json()["predictions"]) == 1
    taken = {"vertex_predict_path": "/generate", "vertex_health_path": "/health"}
    async with running(tmp_path / "taken", **taken) as router:
        assert "generated_text" in (await router.post("/generate", NATIVE)).json()
        assert (await router.client.get("/health")).status_code == 200


@pytest.mark.parametrize("path", ["predict", "/a/{b}", "/a?b"])
def test_paths_that_are_none(path: str) -> None:
    result = CliRunner().invoke(main, ["--aip-predict-route", path])
    assert result.exit_code == 2
    assert "is not the path of a route" in result.output
