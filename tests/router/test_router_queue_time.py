"""--max-queue-time: who was not scheduled in time is refused; who was is not."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import tiny_tokenizers
from router_app import Running, running
from scripted_shard import ScriptedShard

MESSAGE = "Model is overloaded: the request waited in the queue for longer than `max_queue_time`, 0.2 seconds"


def native(prompt: str, max_new_tokens: int = 8) -> dict[str, Any]:
    return {"inputs": prompt, "parameters": {"max_new_tokens": max_new_tokens}}


def long_prompt(letter: str) -> str:
    """Takes nearly all blocks of the shard of the tests below."""
    return letter * 100


@asynccontextmanager
async def with_a_queue(folder: Path) -> AsyncIterator[Running]:
    """A server with room for one long prompt, which is held: whoever comes waits in the queue."""
    shard = ScriptedShard(vocab_size=tiny_tokenizers.VOCAB_SIZE, num_blocks=32)
    async with running(folder, shard=shard, step_s=0.15, max_queue_time_s=0.2) as router:
        held = asyncio.create_task(router.post("/generate", native(long_prompt("a"), max_new_tokens=27)))
        while not router.step_loop._scheduler.running:  # noqa: ASYNC110  # polled
            await asyncio.sleep(0.01)
        yield router
        assert (await held).status_code == 200


async def test_the_time_in_the_queue_is_limited(tmp_path: Path) -> None:
    prompt = long_prompt("b")
    async with with_a_queue(tmp_path) as router:
        chat = {"messages": [{"role": "user", "content": prompt[:80]}], "max_tokens": 20}
        bodies = [
            ("/generate", native(prompt)),
            ("/v1/chat/completions", chat),
            ("/v1/chat/completions", chat | {"stream": True, "n": 2}),
            ("/v1/completions", {"prompt": prompt, "max_tokens": 20, "stream": True}),
        ]
        streamed = asyncio.create_task(router.post("/generate_stream", native(prompt)))
        for reply in await asyncio.gather(*(router.post(path, body) for path, body in bodies)):
            assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
            assert reply.headers["content-type"] == "application/json"
            told = reply.json()["error"]
            assert (told if isinstance(told, str) else told["message"]) == MESSAGE
        # TGI's own streams have begun by then.
        begun = await streamed
        assert begun.status_code == 200
        error = {"error": MESSAGE, "error_type": "overloaded"}
        assert json.loads(begun.text.removeprefix("data: ")) == error


async def test_a_request_that_has_begun_is_not_limited(tmp_path: Path) -> None:
    """Its second prompt waits for the first one, for longer than a request may wait."""
    shard = ScriptedShard(vocab_size=tiny_tokenizers.VOCAB_SIZE, num_blocks=32)
    prompts = [long_prompt("a"), long_prompt("b")]
    body = {"prompt": prompts, "max_tokens": 20, "ignore_eos": True}
    async with running(tmp_path, shard=shard, step_s=0.02, max_queue_time_s=0.1) as router:
        reply = await router.post("/v1/completions", body)
        assert reply.status_code == 200, reply.text
        assert reply.json()["usage"]["completion_tokens"] == 40
