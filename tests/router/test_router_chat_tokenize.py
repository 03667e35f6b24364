"""POST /chat_tokenize: the prompt of a chat, and its tokens."""

from pathlib import Path
from typing import Any

from router_app import running

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hé"}], "max_tokens": 1}


async def test_it_tells_what_the_chat_route_feeds(tmp_path: Path) -> None:
    async with running(tmp_path) as router:
        response = await router.post("/chat_tokenize", CHAT)
        assert response.status_code == 200
        assert list(response.json()) == ["tokenize_response", "templated_text"]
        text, tokens = response.json()["templated_text"], response.json()["tokenize_response"]
        usage = (await router.post("/v1/chat/completions", CHAT)).json()["usage"]
        assert usage["prompt_tokens"] == len(tokens)
        for token in tokens:
            assert text.encode()[token["start"] : token["stop"]].decode() == token["text"]
        lines = (await router.client.get("/metrics")).text.splitlines()
        assert "tgi_request_count 2" in lines


async def test_it_needs_the_key_and_a_template(tmp_path: Path) -> None:
    async with running(tmp_path / "key", api_key="Sesame") as router:
        assert (await router.post("/chat_tokenize", CHAT)).status_code == 401
    async with running(tmp_path / "none", chat_template_text=None) as router:
        response = await router.post("/chat_tokenize", CHAT)
        assert response.status_code == 422
        assert response.json() == {
            "error": "Template error: template not found",
            "error_type": "template_error",
        }
