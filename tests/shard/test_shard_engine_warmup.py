"""Warm-up: memory becomes KV blocks, limits hold, and the engine that comes out of it works."""

from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_models
from engine_driver import make_plan
from tgi_shard.distributed import SINGLE
from tgi_shard.engine import Engine
from tgi_shard.memory import Limits
from tgi_shard.models.registry import LoadedModel, load_model
from tgi_shard.plan import AddSequence
from tgi_shard.sampling.sampler import Sampler
from tgi_shard.warmup import NotEnoughMemory, warm_up

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    checkpoint = tiny_models.save(request.param, tmp_path_factory.mktemp(request.param))
    return load_model(checkpoint, dtype=None, device=CPU, group=SINGLE)


def engine_for(loaded: LoadedModel, limits: Limits, num_blocks: int | None = None) -> Engine:
    kv_bytes = None if num_blocks is None else num_blocks * loaded.model.kv_shape.bytes_per_block(32) + 1
    return warm_up(loaded, Sampler(), SINGLE, CPU, limits, memory_fraction=0.9, cpu_kv_bytes=kv_bytes)


def test_memory_becomes_blocks(loaded: LoadedModel) -> None:
    engine = engine_for(loaded, Limits(max_step_tokens=4096, max_total_tokens=100, max_sequences=64), 50)
    assert engine.kv_cache.num_blocks == engine.slots.num_kv_blocks == 50
    assert engine.slots.max_total_tokens == 100
    add = [AddSequence(1, np.arange(99), np.empty(0, np.int64))]
    result = engine.finish(engine.step(make_plan(1, add=add, run={1: (99, [49, 0, 7, 3])})))
    assert result.sequence_ids == [1]
    assert result.failed == []


def test_no_more_blocks_than_the_sequences_can_use(loaded: LoadedModel) -> None:
    engine = engine_for(loaded, Limits(max_step_tokens=10, max_total_tokens=100, max_sequences=3))
    assert engine.kv_cache.num_blocks == 3 * 4


def test_max_total_tokens_follows_from_the_blocks_and_the_model(loaded: LoadedModel) -> None:
    limits = Limits(max_step_tokens=100, max_total_tokens=0, max_sequences=2)
    assert engine_for(loaded, limits, 10).slots.max_total_tokens == 10 * 32
    assert engine_for(loaded, limits, 1000).slots.max_total_tokens == 512
    assert engine_for(loaded, limits).kv_cache.num_blocks == 2 * 512 // 32


def test_too_little_memory_is_told(loaded: LoadedModel) -> None:
    limits = Limits(max_step_tokens=100, max_total_tokens=400, max_sequences=2)
    with pytest.raises(NotEnoughMemory, match=r"to handle `max_total_tokens=400`.*12 blocks"):
        engine_for(loaded, limits, 12)
    assert engine_for(loaded, limits, 13).slots.max_total_tokens == 400


def test_a_recurrent_models_block_is_a_whole_state(tmp_path: Path) -> None:
    checkpoint = tiny_models.save("mamba", tmp_path)
    loaded = load_model(checkpoint, dtype=None, device=CPU, group=SINGLE)
    state_bytes = loaded.model.kv_shape.bytes_per_block(1)
    assert state_bytes == 3 * 96 * (3 + 12) * 4  # layers x channels x (convolution's inputs + state)

    def warmed_up(max_total_tokens: int, max_sequences: int, num_states: int) -> Engine:
        limits = Limits(300, max_total_tokens, max_sequences)
        kv_bytes = num_states * state_bytes + 1
        return warm_up(loaded, Sampler(), SINGLE, CPU, limits, memory_fraction=0.9, cpu_kv_bytes=kv_bytes)

    slots = warmed_up(0, 8, 5).slots
    assert (slots.num_kv_blocks, slots.block_size, slots.max_total_tokens) == (5, 8192, 8192)
    slots = warmed_up(100, 8, 50).slots
    assert (slots.num_kv_blocks, slots.block_size, slots.max_total_tokens) == (8, 100, 100)
    assert warmed_up(100, 1, 50).slots.num_kv_blocks == 1
    with pytest.raises(NotEnoughMemory, match="1 blocks of 100 tokens"):
        warmed_up(100, 8, 1)
