"""What a request leaves behind: nothing that would wait for the garbage collector."""

import asyncio
import gc
import json
from collections import Counter
from pathlib import Path
from typing import Any

from router_app import listening, running
from tgi_router.connection import Connection

NATIVE = {"inputs": "hello", "parameters": {"max_new_tokens": 5}}
OPENAI = {"model": "m", "prompt": "hello", "max_tokens": 5}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
TWO = OPENAI | {"prompt": ["hello", "you"], "n": 2}  # one more than there are permits
SCHEMA = {"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {}}}
WITH_GRAMMAR = {"max_new_tokens": 5, "grammar": {"type": "json", "value": SCHEMA}}
NUM_PERMITS = 3
REQUESTS: list[tuple[str, dict[str, Any], int]] = [
    ("/generate", NATIVE, 200),
    ("/generate_stream", NATIVE, 200),
    ("/generate", {"inputs": ""}, 422),
    ("/generate_stream", {"inputs": "x", "parameters": WITH_GRAMMAR}, 200),
    ("/v1/completions", OPENAI, 200),
    ("/v1/completions", OPENAI | {"n": 2, "stream": True}, 200),
    ("/v1/completions", TWO, 429),
    ("/v1/completions", TWO | {"stream": True}, 429),
    ("/v1/chat/completions", CHAT, 200),
    ("/v1/chat/completions", CHAT | {"stream": True, "logprobs": True}, 200),
]


async def ask(port: int, path: str, body: dict[str, Any], *, is_patient: bool = True) -> int:
    """The status. Whoever has no patience hangs up at the first bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-type: application/json\r\n"
    writer.write(head.encode() + b"content-length: %d\r\n\r\n%b" % (len(data), data))
    answer = await (reader.read() if is_patient else reader.read(20))
    writer.close()
    await writer.wait_closed()
    return int(answer.split(b" ")[1])


async def ask_everything(port: int) -> None:
    for path, body, status in REQUESTS:
        assert await ask(port, path, body) == status
    long = {"inputs": "hello", "parameters": {"max_new_tokens": 100}}
    assert await ask(port, "/generate_stream", long, is_patient=False) == 200


async def test_requests_leave_no_circles(tmp_path: Path) -> None:
    async with (
        running(
            tmp_path, chat_template_text="{{ messages[0].content }}", max_concurrent_requests=3
        ) as router,
        listening(router, Connection) as port,
    ):

        async def until_idle() -> None:
            while router.app.generation.permits._num_free < NUM_PERMITS:  # noqa: ASYNC110  # polled
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)  # the last callbacks of connections that are gone

        await ask_everything(port)  # what stays for ever is made the first time
        await until_idle()
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            await ask_everything(port)
            await until_idle()
            gc.collect()
            left = Counter(type(found) for found in gc.garbage)
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
    rooms = ("tgi_router", "uvicorn", "starlette", "uvloop")
    assert not {kind: count for kind, count in left.items() if kind.__module__.startswith(rooms)}
