"""The router's loop and a real shard that one token breaks: its request fails, its neighbours go on."""

import asyncio
from pathlib import Path

import tiny_models
from broken_shard import BUG_TOKEN, running_broken
from tgi_router.metrics import Metrics
from tgi_router.request import FinishReason, Request, SampledToken, Sampling
from tgi_router.scheduling.step_loop import StepLoop
from tgi_router.shards.group import ShardGroup

NUM_OUTPUT = 30


class Ear:
    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.error: Exception | None = None
        self.done = asyncio.Event()

    def on_scheduled(self) -> None:
        pass

    def on_prompt_logprobs(self, start_position: int, logprobs: list[float]) -> None:
        pass

    def on_token(self, token: SampledToken) -> FinishReason | None:
        self.token_ids.append(token.token_id)
        if len(self.token_ids) < NUM_OUTPUT:
            return None
        self.done.set()
        return "length"

    def on_error(self, error: Exception) -> None:
        self.error = error
        self.done.set()


async def generate(loop: StepLoop, prompts: list[tuple[int, ...]]) -> list[Ear]:
    ears = [Ear() for _ in prompts]
    for prompt, ear in zip(prompts, ears, strict=True):
        loop.submit(Request("r", "", prompt, Sampling(), NUM_OUTPUT), ear)
    async with asyncio.timeout(120):
        await asyncio.gather(*(ear.done.wait() for ear in ears))
    return ears


async def test_a_request_whose_steps_raise_fails_alone(tmp_path: Path) -> None:
    checkpoint = tiny_models.save("llama", tmp_path / "model")
    with running_broken(checkpoint, tmp_path) as shard:
        loop = StepLoop(
            ShardGroup([f"unix:{shard.socket_path}"]),
            Metrics(),
            max_batch_prefill_tokens=128,
            max_total_tokens=100,
            max_sequences=8,
        )
        await asyncio.wait_for(loop.start(), 60)
        prompts = [(number, 5, 6) for number in range(4)]
        undisturbed = await generate(loop, prompts)
        *ears, guilty = await generate(loop, [*prompts, (5, BUG_TOKEN, 6)])
        assert [ear.token_ids for ear in ears] == [ear.token_ids for ear in undisturbed]
        assert guilty.token_ids == []
        assert "fail whenever they compute this sequence: RuntimeError: a bug in a kernel" in str(
            guilty.error
        )
        assert shard.process.poll() is None
        await loop.close()
