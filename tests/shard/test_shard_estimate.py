"""The estimate, made without weights, against what a real load and a real warm-up hold."""

from pathlib import Path

import pytest
import torch

import tiny_models
from tgi_shard import estimate as estimating
from tgi_shard import warmup
from tgi_shard.distributed import SINGLE, Group
from tgi_shard.estimate import CPU_PROCESS_BYTES, Estimate, estimate
from tgi_shard.memory import Limits, held_bytes, human
from tgi_shard.models.registry import load_model
from tgi_shard.sampling.sampler import Sampler

CPU, META = torch.device("cpu"), torch.device("meta")
LIMITS = Limits(max_step_tokens=64, max_total_tokens=0, max_sequences=5)


def estimated(model: Path, limits: Limits = LIMITS, num_ranks: int = 1) -> Estimate:
    return estimate(
        model,
        dtype=None,
        device=CPU,
        num_ranks=num_ranks,
        rope_override=None,
        memory_fraction=0.9,
        limits=limits,
    )


@pytest.mark.parametrize("group", [SINGLE, Group(0, 2), Group(1, 2)], ids=["1 of 1", "1 of 2", "2 of 2"])
@pytest.mark.parametrize("model_type", [*tiny_models.DECODERS, *tiny_models.ENCODER_DECODERS])
def test_weights_are_told_to_the_byte(model_type: str, group: Group, tmp_path: Path) -> None:
    model = tiny_models.save(model_type, tmp_path)
    for dtype in (None, torch.bfloat16):
        real = load_model(model, dtype=dtype, device=CPU, group=group)
        planned = load_model(model, dtype=dtype, device=META, group=group)
        assert held_bytes(planned.model) == held_bytes(real.model)
        assert planned.model.kv_shape == real.model.kv_shape


def test_a_tensor_that_two_share_counts_once() -> None:
    table = torch.zeros(10, 4)
    assert held_bytes([{"head": table}, (table.t(), table[2:])]) == 160
    assert held_bytes([table[2:4], table[3:6]]) == 4 * 4 * 4  # a range of a larger storage
    assert held_bytes([table, torch.zeros(3, dtype=torch.int64)]) == 160 + 24


@pytest.mark.parametrize(
    "limits",
    [
        LIMITS,  # the sequences' lengths decide
        Limits(max_step_tokens=64, max_total_tokens=70, max_sequences=3),
        Limits(max_step_tokens=64, max_total_tokens=500, max_sequences=4000),  # the memory decides
    ],
)
def test_blocks_are_those_of_the_warm_up(
    limits: Limits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.save("llama", tmp_path)
    loaded = load_model(model, dtype=None, device=CPU, group=SINGLE)
    # The same machine before the model came, and after.
    before = CPU_PROCESS_BYTES + held_bytes(loaded.model) + (20 << 20)
    monkeypatch.setattr(estimating, "available_cpu_bytes", lambda: before)
    monkeypatch.setattr(warmup, "available_cpu_bytes", lambda: 20 << 20)
    made = estimated(model, limits)
    engine = warmup.warm_up(loaded, Sampler(), SINGLE, CPU, limits, memory_fraction=0.9)
    blocks = made.plan.blocks
    assert made.problem is None
    assert (blocks.num_blocks, blocks.block_size) == (engine.kv_cache.num_blocks, engine.kv_cache.block_size)
    assert blocks.max_total_tokens == engine.slots.max_total_tokens
    assert blocks.num_bytes == held_bytes(engine.kv_cache)
    assert made.plan.workspace == held_bytes([engine.slots.token_ids, engine.slots.block_tables])


def test_what_does_not_fit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.save("llama", tmp_path)
    weights = estimated(model).plan.weights
    too_long = estimated(model, Limits(max_step_tokens=64, max_total_tokens=10**9, max_sequences=4))
    assert too_long.problem is not None
    assert "`max_total_tokens=1000000000`" in too_long.describe()
    monkeypatch.setattr(estimating, "available_cpu_bytes", lambda: CPU_PROCESS_BYTES + weights)
    too_big = estimated(model)
    assert too_big.problem == (
        f"{human(weights)} of weights do not go into the {human(CPU_PROCESS_BYTES + weights)} that are free"
    )
    assert too_big.plan.max_requests == 0


def test_ranks_share_a_cpu_s_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.save("llama", tmp_path)
    monkeypatch.setattr(estimating, "available_cpu_bytes", lambda: 2 * CPU_PROCESS_BYTES + (20 << 20))
    limits = Limits(max_step_tokens=64, max_total_tokens=500, max_sequences=4000)
    alone, shared = estimated(model, limits), estimated(model, limits, num_ranks=2)
    assert shared.plan.weights < alone.plan.weights
    assert shared.plan.blocks.bytes_per_block == alone.plan.blocks.bytes_per_block // 2
    assert 0 < shared.plan.blocks.budget_bytes < (20 << 20) // 4


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1536 << 10, "1.50 MiB"), (3000 << 30, "3000.00 GiB")],
)
def test_units(num_bytes: int, text: str) -> None:
    assert human(num_bytes) == text
