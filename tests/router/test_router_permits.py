"""Permits: all or none, never lost, and an honest word on when to come back."""

import asyncio
import random
from pathlib import Path

import httpx
import pytest

from router_app import listening, running
from tgi_router.errors import Overloaded
from tgi_router.permits import Permits

MAX_CONCURRENT = 4


def refused(permits: Permits, count: int) -> int | None:
    with pytest.raises(Overloaded) as raised:
        permits.take(count)
    return raised.value.retry_after_s


def test_all_or_none() -> None:
    permits = Permits(3)
    permits.take(2)
    refused(permits, 2)
    permits.take(1)
    refused(permits, 1)
    permits.give_back(3)
    permits.take(3)


def test_when_to_try_again_follows_from_how_long_generations_take() -> None:
    permits = Permits(10)
    permits.take(10)
    assert refused(permits, 1) == 1  # nothing is known
    permits.observe(25.0)
    assert [refused(permits, count) for count in (1, 2, 4)] == [3, 5, 10]  # of ten, one comes back in 2.5 s
    for _ in range(100):
        permits.observe(0.5)
    assert refused(permits, 10) == 1
    for _ in range(100):
        permits.observe(10_000.0)
    assert refused(permits, 1) == 60


def test_no_permits_at_all() -> None:
    assert refused(Permits(0), 1) == 1


async def test_permits_are_conserved_whenever_clients_leave(tmp_path: Path) -> None:
    """Clients that leave at any moment, on every kind of route: in the end all permits are back."""
    rng = random.Random(0)
    bodies = [
        ("/generate", {"inputs": "ab", "parameters": {"max_new_tokens": 20}}),
        ("/generate", {"inputs": "ab", "parameters": {"best_of": 2, "do_sample": True}}),
        ("/generate", {"inputs": ""}),
        ("/generate_stream", {"inputs": "ab", "parameters": {"max_new_tokens": 20}}),
        ("/v1/completions", {"prompt": ["a", "b"], "stream": True, "max_tokens": 20}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "stream": True, "n": 2}),
    ]
    async with (
        running(tmp_path, step_s=0.001, max_concurrent_requests=MAX_CONCURRENT) as router,
        listening(router) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60.0) as client,
    ):
        statuses = await asyncio.gather(*(_visit(client, rng, *rng.choice(bodies)) for _ in range(60)))
        assert {None, 200, 429} <= set(statuses)  # some left, some stayed, some were refused
        permits = router.app.generation.permits
        while permits._num_free != MAX_CONCURRENT:  # noqa: ASYNC110  # the last to leave are being noticed
            await asyncio.sleep(0.01)
        permits.take(MAX_CONCURRENT)


async def _visit(client: httpx.AsyncClient, rng: random.Random, path: str, body: object) -> int | None:
    """The status; None: the client left before it had all."""
    await asyncio.sleep(rng.uniform(0.0, 0.5))
    patience_s = rng.choice((0.0, rng.uniform(0.0, 0.1), 60.0))
    try:
        return (await asyncio.wait_for(client.post(path, json=body), patience_s)).status_code
    except TimeoutError:
        return None
