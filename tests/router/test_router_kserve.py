"""The KServe v2 protocol."""

from pathlib import Path
from typing import Any

from router_app import running

MODEL = "/v2/models/some/model/versions/1"


def inference(*prompts: bytes, **more: Any) -> dict[str, Any]:
    inputs = [
        {"name": f"in{i}", "shape": [1, len(prompt)], "datatype": "BYTES", "data": list(prompt)}
        for i, prompt in enumerate(prompts)
    ]
    outputs = [{"name": f"out{i}"} for i in range(len(prompts))]
    return {"id": "7", "parameters": {"max_new_tokens": 6}, "inputs": inputs, "outputs": outputs} | more


async def test_what_it_says_about_itself(tmp_path: Path) -> None:
    async with running(tmp_path) as router:
        for path in ("/v2/health/live", "/v2/health/ready", f"{MODEL}/ready"):
            assert (await router.client.get(path)).json() == {"live": True}
        server = (await router.client.get("/v2")).json()
        assert server["extensions"] == ["health", "models", "metrics"]
        model = (await router.client.get(MODEL)).json()
        assert model == {"name": "some/model", "version": "1", "extensions": ["infer", "ready"]}
        router.step_loop._are_shards_back = False
        assert (await router.client.get(f"{MODEL}/ready")).status_code == 503
        assert (await router.client.get("/v2/health/live")).status_code == 200


async def test_infer(tmp_path: Path) -> None:
    async with running(tmp_path) as router:
        body = {"inputs": "the one", "parameters": {"max_new_tokens": 6}}
        text = (await router.post("/generate", body)).json()["generated_text"]
        response = await router.post(f"{MODEL}/infer", inference(b"the one", b"ab"))
        assert response.status_code == 200
        reply = response.json()
        assert reply["id"] == "7"
        assert [output["name"] for output in reply["outputs"]] == ["out0", "out1"]
        assert bytes(reply["outputs"][0]["data"]).decode() == text
        assert reply["outputs"][0]["shape"] == [1, len(text.encode())]


async def test_what_it_refuses(tmp_path: Path) -> None:
    async with running(tmp_path, api_key="Sesame") as router:
        headers = {"authorization": "Bearer Sesame"}
        assert (await router.post(f"{MODEL}/infer", inference(b"a"))).status_code == 401
        for body, error_type in (
            (inference(b"\xff"), "utf8"),
            (inference(b"a", outputs=[]), "length mismatch"),
            (inference(b"a", parameters={"top_p": 1.0}), "validation"),
        ):
            response = await router.post(f"{MODEL}/infer", body, headers=headers)
            assert (response.status_code, response.json()["error_type"]) == (422, error_type)
        assert (await router.client.get(MODEL)).status_code == 200
