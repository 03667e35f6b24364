"""The step loop against scripted shards behind real gRPC: order, cancelling, losing the shards."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc import aio

from scripted_shard import ScriptedService, ScriptedShard, next_token, start_server
from tgi_proto import generate_pb2 as pb
from tgi_router.metrics import Metrics
from tgi_router.request import FinishReason, Request, SampledToken, Sampling
from tgi_router.scheduling.step_loop import ShardsGone, StepLoop
from tgi_router.shards.client import WarmupRefused
from tgi_router.shards.group import ShardGroup


class Ear:
    """A listener that keeps what it hears; `done` is set by the last token or an error."""

    def __init__(self, request: Request, eos: int | None = None) -> None:
        self.request = request
        self.eos = eos
        self.tokens: list[SampledToken] = []
        self.prompt_logprobs: list[float] = []
        self.num_scheduled = 0
        self.error: Exception | None = None
        self.done = asyncio.Event()
        self.on_each: Callable[[], None] = lambda: None

    def on_scheduled(self) -> None:
        self.num_scheduled += 1

    def on_prompt_logprobs(self, start_position: int, logprobs: list[float]) -> None:
        assert start_position == len(self.prompt_logprobs) + 1
        self.prompt_logprobs.extend(logprobs)

    def on_token(self, token: SampledToken) -> FinishReason | None:
        assert not self.done.is_set()
        self.tokens.append(token)
        self.on_each()
        if token.token_id == self.eos:
            self.done.set()
            return "eos_token"
        if len(self.tokens) == self.request.max_new_tokens:
            self.done.set()
            return "length"
        return None

    def on_error(self, error: Exception) -> None:
        assert not self.done.is_set()
        self.error = error
        self.done.set()

    def check(self, vocab_size: int = 256) -> None:
        assert self.error is None
        token_ids = list(self.request.prompt_token_ids)
        for token in self.tokens:
            assert token.token_id == next_token(token_ids, vocab_size)
            token_ids.append(token.token_id)


def make_request(prompt: tuple[int, ...], max_new_tokens: int = 20, **fields: object) -> Request:
    return Request("r", "", prompt, Sampling(), max_new_tokens, **fields)  # type: ignore[arg-type]


Crash = Callable[[], Awaitable[None]]


@asynccontextmanager
async def running_loop(
    tmp_path: Path, *, world_size: int = 1, step_s: float = 0.0, **shard_fields: int
) -> AsyncIterator[tuple[StepLoop, list[ScriptedService], Crash]]:
    """A started loop, its shards, and a way to kill all shards and start fresh ones on the same paths."""
    addresses = [f"unix:{tmp_path}/shard-{rank}" for rank in range(world_size)]
    servers, services = [], []

    async def start_shards() -> None:
        services.clear()
        servers.clear()
        for rank, address in enumerate(addresses):
            shard = ScriptedShard(rank=rank, world_size=world_size, **shard_fields)
            services.append(ScriptedService(shard, step_s))
            servers.append(await start_server(services[-1], address))

    async def crash() -> None:
        await asyncio.gather(*(server.stop(None) for server in servers))
        await start_shards()

    await start_shards()
    loop = StepLoop(
        ShardGroup(addresses), Metrics(), max_batch_prefill_tokens=32, max_total_tokens=None, max_sequences=8
    )
    try:
        await asyncio.wait_for(loop.start(), 10)
        yield loop, services, crash
    finally:
        await loop.close()
        await asyncio.gather(*(server.stop(None) for server in servers))


@pytest.mark.parametrize("world_size", [1, 2])
async def test_concurrent_sequences_each_get_their_own_tokens(tmp_path: Path, world_size: int) -> None:
    async with running_loop(tmp_path, world_size=world_size) as (loop, services, _):
        ears = [Ear(make_request((i, 1, 2, 3) * (i + 1), top_n_tokens=i % 3)) for i in range(16)]
        for ear in ears:
            loop.submit(ear.request, ear)
        await asyncio.wait_for(asyncio.gather(*(ear.done.wait() for ear in ears)), 20)
        for ear in ears:
            ear.check()
            assert ear.num_scheduled == 1
            assert all(len(token.top_tokens) == ear.request.top_n_tokens for token in ear.tokens)
        await asyncio.wait_for(loop.drain(), 5)
        assert services[0].shard.num_steps == services[-1].shard.num_steps


def refuse_warmups(monkeypatch: pytest.MonkeyPatch, count: int) -> list[None]:
    """The next so many. Returns those that are still to come."""
    left = [None] * count
    warm_up = ScriptedService.Warmup

    async def refuse(
        service: ScriptedService, request: pb.WarmupRequest, context: aio.ServicerContext
    ) -> pb.WarmupResponse:
        if left:
            left.pop()
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "not enough memory")
        return await warm_up(service, request, context)

    monkeypatch.setattr(ScriptedService, "Warmup", refuse)
    return left


async def test_what_the_shards_refuse_at_the_start_is_refused_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_warmups(monkeypatch, 1)
    with pytest.raises(WarmupRefused, match="not enough memory"):
        async with running_loop(tmp_path):
            pass


async def test_what_the_shards_refuse_after_a_crash_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_loop(tmp_path, step_s=0.002) as (loop, _, crash):
        ear = Ear(make_request((1, 2, 3), 30))
        loop.submit(ear.request, ear)
        left = refuse_warmups(monkeypatch, 3)
        await crash()
        await asyncio.wait_for(ear.done.wait(), 20)
        assert not left
        ear.check()


async def test_prompt_logprobs_arrive_once_in_order(tmp_path: Path) -> None:
    async with running_loop(tmp_path) as (loop, _, _):
        ear = Ear(make_request(tuple(range(90)), 5, prompt_logprobs=True))  # longer than a step's budget
        loop.submit(ear.request, ear)
        await asyncio.wait_for(ear.done.wait(), 10)
        assert ear.prompt_logprobs == [-float(position) for position in range(1, 90)]


async def test_a_cancelled_sequence_frees_its_blocks_and_hears_nothing_more(tmp_path: Path) -> None:
    async with running_loop(tmp_path, step_s=0.002) as (loop, services, _):
        ear, other = Ear(make_request((1, 2, 3), 100)), Ear(make_request((4, 5), 30))
        sequence_id = loop.submit(ear.request, ear)
        loop.submit(other.request, other)
        ear.on_each = lambda: None if len(ear.tokens) != 3 else loop.cancel(sequence_id)
        await asyncio.wait_for(other.done.wait(), 10)
        other.check()
        assert len(ear.tokens) == 3
        await asyncio.wait_for(until(lambda: not services[0].shard.sequences), 5)
        assert loop._scheduler.allocator.num_held == 0


async def test_an_end_by_eos_ignores_the_surplus_token(tmp_path: Path) -> None:
    prompt = (5, 6, 7)
    token_ids = list(prompt)
    for _ in range(4):
        token_ids.append(next_token(token_ids, 256))
    async with running_loop(tmp_path) as (loop, services, _):
        ear = Ear(make_request(prompt, 50), eos=token_ids[-1])
        loop.submit(ear.request, ear)
        await asyncio.wait_for(ear.done.wait(), 5)
        await asyncio.wait_for(until(lambda: not services[0].shard.sequences), 5)
        assert len(ear.tokens) == 4


@pytest.mark.parametrize("world_size", [1, 2])
async def test_streams_survive_lost_shards(tmp_path: Path, world_size: int) -> None:
    async with running_loop(tmp_path, world_size=world_size, step_s=0.001) as (loop, _, crash):
        ears = [Ear(make_request((i, 9, 9), 60, prompt_logprobs=i == 0)) for i in range(12)]
        for ear in ears:
            loop.submit(ear.request, ear)
        for num_tokens in (1, 5, 25):
            await asyncio.wait_for(until(lambda n=num_tokens: len(ears[0].tokens) >= n), 10)
            await crash()
        await asyncio.wait_for(asyncio.gather(*(ear.done.wait() for ear in ears)), 30)
        for ear in ears:
            ear.check()
            assert len(ear.tokens) == 60
            assert ear.num_scheduled == 1
        assert ears[0].prompt_logprobs == [-1.0, -2.0]
        assert loop._metrics.tgi_recoveries._value.get() == 3


async def test_running_out_of_memory_shortens_prompt_chunks_and_blames_nobody(tmp_path: Path) -> None:
    async with running_loop(tmp_path) as (loop, services, _):
        services[0].max_tokens_in_memory = 24
        ears = [Ear(make_request((i, *range(60)), 10)) for i in range(4)]
        for ear in ears:
            loop.submit(ear.request, ear)
        await asyncio.wait_for(asyncio.gather(*(ear.done.wait() for ear in ears)), 60)
        for ear in ears:
            ear.check()
        assert loop._scheduler.prompt_budget.num_tokens <= 24
        assert not loop._scheduler.blame.quarantined


async def test_an_idle_loop_notices_lost_shards_and_serves_again(tmp_path: Path) -> None:
    async with running_loop(tmp_path) as (loop, _, crash):
        await crash()
        ear = Ear(make_request((1, 2)))
        loop.submit(ear.request, ear)
        await asyncio.wait_for(ear.done.wait(), 10)
        ear.check()


async def test_what_can_never_fit_fails_alone(tmp_path: Path) -> None:
    async with running_loop(tmp_path, num_blocks=8, block_size=4) as (loop, _, _):
        giant, small = Ear(make_request(tuple(range(40)))), Ear(make_request((1, 2)))
        loop.submit(giant.request, giant)
        loop.submit(small.request, small)
        await asyncio.wait_for(asyncio.gather(giant.done.wait(), small.done.wait()), 5)
        assert "40 tokens do not fit into the KV cache of 8 blocks of 4 tokens" in str(giant.error)
        small.check()


async def test_draining_without_shards_fails_what_is_open(tmp_path: Path) -> None:
    async with running_loop(tmp_path, step_s=0.01) as (loop, _, _):
        ear = Ear(make_request((1, 2), 1000))
        loop.submit(ear.request, ear)
        await asyncio.wait_for(until(lambda: len(ear.tokens) > 1), 5)
        loop._are_shards_back = False  # as between the loss and the return
        await asyncio.wait_for(loop.drain(), 5)
        assert isinstance(ear.error, ShardsGone)


async def test_losing_the_shards_while_draining_fails_what_is_open(tmp_path: Path) -> None:
    async with running_loop(tmp_path, step_s=0.01) as (loop, _, crash):
        ear = Ear(make_request((1, 2), 1000))
        loop.submit(ear.request, ear)
        await asyncio.wait_for(until(lambda: len(ear.tokens) > 1), 5)
        draining = asyncio.create_task(loop.drain())
        await asyncio.sleep(0.02)
        await crash()
        await asyncio.wait_for(draining, 5)
        assert isinstance(ear.error, ShardsGone)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  # a test waits for another task's effect
        await asyncio.sleep(0.005)
