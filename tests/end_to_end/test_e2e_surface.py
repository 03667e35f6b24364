"""The parts of the HTTP surface that take a whole server: real sockets, the launcher's options."""

import json
import time

import pytest

from server import Server

CHAT = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}


def test_head_answers_without_a_body(demo_server: Server) -> None:
    for path in ("/", "/health", "/info", "/v1/models", "/metrics", "/docs/", "/api-doc/openapi.json"):
        got, head = demo_server.client.get(path), demo_server.client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        if path != "/metrics":
            assert head.headers["content-length"] == got.headers["content-length"]


def test_clouds_and_kserve(demo_server: Server) -> None:
    answer = demo_server.client.post("/invocations", json=CHAT).json()["choices"][0]["message"]["content"]
    assert "Paris" in answer
    response = demo_server.client.post("/vertex", json={"instances": [CHAT]})
    assert response.json() == {"predictions": [answer]}
    prompt = demo_server.client.post("/chat_tokenize", json=CHAT).json()["templated_text"]
    body = {
        "id": "1",
        "parameters": {"max_new_tokens": 20},
        "inputs": [{"name": "a", "shape": [1], "datatype": "BYTES", "data": list(prompt.encode())}],
        "outputs": [{"name": "b"}],
    }
    response = demo_server.client.post("/v2/models/demo/versions/1/infer", json=body)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("route", ["/generate", "/generate_stream"])
def test_each_request_logs_one_line_of_success(demo_server: Server, route: str) -> None:
    own_id = f"one-line-{route.removeprefix('/')}"  # lines of other requests may still be on their way
    body = {"inputs": "a", "parameters": {"max_new_tokens": 2}}
    demo_server.client.post(route, json=body, headers={"x-request-id": own_id})

    def num_lines() -> int:
        return sum("Success" in line and own_id in line for line in demo_server.log().splitlines())

    deadline = time.monotonic() + 10
    while num_lines() == 0 and time.monotonic() < deadline:
        time.sleep(0.05)  # a stream is over for its client before it is for the router
    time.sleep(0.2)
    assert num_lines() == 1


def test_documents(demo_server: Server) -> None:
    document = demo_server.client.get("/api-doc/openapi.json").json()
    assert document["info"]["title"] == "Text Generation Inference"
    assert json.dumps(document)
    assert demo_server.client.get("/docs", follow_redirects=True).status_code == 200
