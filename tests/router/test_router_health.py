"""What /health tells of a router in each of its states."""

import asyncio
import time
from pathlib import Path

import pytest

from router_app import Running, running
from scripted_shard import ScriptedShard
from tgi_router.scheduling.step_loop import StepLoop

STEP_S = 0.3
BODY = {"inputs": "the one", "parameters": {"max_new_tokens": 4}}


async def state(router: Running) -> str:
    """Checks that status and body go with the state, too."""
    response = await router.client.get("/health")
    told = response.headers["x-health-state"]
    if told in ("ok", "busy"):
        assert (response.status_code, response.content) == (200, b"")
    else:
        assert response.status_code == 503
        assert response.json() == {"error": "unhealthy", "error_type": "healthcheck", "state": told}
    return str(told)


async def until(router: Running, wanted: str) -> None:
    deadline = time.monotonic() + 10
    while (told := await state(router)) != wanted:
        assert time.monotonic() < deadline, told
        await asyncio.sleep(0.01)


async def test_stalled_while_a_step_takes_too_long(tmp_path: Path) -> None:
    async with running(tmp_path, step_s=STEP_S, stall_timeout_s=STEP_S / 3) as router:
        assert await state(router) == "ok"
        request = asyncio.create_task(router.post("/generate", BODY))
        await until(router, "stalled")
        assert (await request).status_code == 200
        assert await state(router) == "ok"


async def test_slow_is_not_stalled(tmp_path: Path) -> None:
    async with running(tmp_path, step_s=STEP_S, stall_timeout_s=STEP_S / 3) as router:
        router.step_loop._longest_step_s = STEP_S / 3  # ten times that is more than any step takes
        request = asyncio.create_task(router.post("/generate", BODY))
        while not request.done():
            assert await state(router) in ("ok", "busy")
            await asyncio.sleep(0.01)


async def test_busy_while_requests_wait_for_memory(tmp_path: Path) -> None:
    shard = ScriptedShard(vocab_size=100, num_blocks=3, block_size=4, max_total_tokens=12)
    async with running(tmp_path, step_s=0.05, shard=shard) as router:
        requests = [asyncio.create_task(router.post("/generate", BODY)) for _ in range(3)]
        await until(router, "busy")
        assert [(await request).status_code for request in requests] == [200] * 3
        await until(router, "ok")


async def test_draining_and_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path) as router:
        router.app.generation.is_draining = True
        assert await state(router) == "draining"
        router.app.generation.is_draining = False

        def broken(_: StepLoop) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(StepLoop, "_plan", broken)
        assert (await router.post("/generate", BODY)).status_code in (424, 500)
        await until(router, "dead")
