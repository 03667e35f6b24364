"""Masks: what they do to scores, and a step that waits for them."""

import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from test_shard_service import RunStream, add, run_all, warm_up

import tiny_models
from engine_driver import BLOCK_SIZE, load_engine, make_plan, prompts
from shard_process import ShardProcess, running
from tgi_proto import generate_pb2 as pb
from tgi_shard.plan import AddSequence, Masks
from tgi_shard.sampling.grammar import mask_disallowed
from tgi_shard.sampling.parameters import SamplingParameters

VOCAB_SIZE = 259
ROW_BYTES = -(-VOCAB_SIZE // 32) * 4


def bits(*allowed: int) -> bytes:
    mask = bytearray(ROW_BYTES)
    for token_id in allowed:
        mask[token_id // 8] |= 1 << token_id % 8
    return bytes(mask)


@pytest.mark.parametrize("vocab_size", [1, 8, 31, 32, 33, 259])
def test_only_allowed_tokens_keep_their_scores(vocab_size: int) -> None:
    draw = np.random.default_rng(vocab_size)
    allowed = draw.random((3, vocab_size)) < 0.3
    packed = np.packbits(np.pad(allowed, ((0, 0), (0, -vocab_size % 32))), axis=1, bitorder="little")
    scores = torch.from_numpy(draw.standard_normal((3, vocab_size), np.float32))
    masked = mask_disallowed(scores.clone(), packed)
    assert torch.equal(masked, torch.where(torch.from_numpy(allowed), scores, float("-inf")))


def test_masked_rows_choose_among_what_is_allowed_and_others_are_not_touched(tmp_path: Path) -> None:
    engine = load_engine(tiny_models.save("llama", tmp_path))
    hot = SamplingParameters(do_sample=True, temperature=1.5, seed=3, repetition_penalty=1.3)
    ids = (4, 7, 9)

    def first_tokens(masks: Masks | None) -> tuple[list[int], list[list[tuple[int, float]]], list[float]]:
        engine.forget()
        adds = [
            AddSequence(i, np.array(prompt), np.empty(0, np.int64), sampling=hot, top_n_tokens=3)
            for i, prompt in zip(ids, prompts(5, 9, 12), strict=True)
        ]
        run = {
            one.sequence_id: (len(one.prompt_token_ids), [2 * row, 2 * row + 1])
            for row, one in enumerate(adds)
        }
        assert BLOCK_SIZE * 2 >= 12
        result = engine.finish(engine.step(make_plan(1, add=adds, run=run), masks))
        assert not result.failed
        return result.token_ids, result.top_tokens, result.logprobs

    free, _, _ = first_tokens(None)
    masks = Masks(
        1, [9, 5, 4], np.stack([np.frombuffer(row, np.uint8) for row in (bits(65), bits(), bits(66, 258))])
    )
    chosen, tops, logprobs = first_tokens(masks)
    assert chosen[0] in (66, 258)
    assert {token_id for token_id, _ in tops[0]} <= {66, 258}
    assert (chosen[1], chosen[2]) == (free[1], 65)
    assert tops[2] == [(65, 0.0)]
    assert logprobs[2] == 0


def test_a_mask_that_allows_nothing_fails_its_sequence_alone(tmp_path: Path) -> None:
    engine = load_engine(tiny_models.save("llama", tmp_path))
    adds = [AddSequence(i, np.array([3, 4]), np.empty(0, np.int64)) for i in (1, 2)]
    plan = make_plan(1, add=adds, run={1: (2, [0]), 2: (2, [1])})
    result = engine.finish(engine.step(plan, Masks(1, [1], np.zeros((1, ROW_BYTES), np.uint8))))
    assert [failure.sequence_id for failure in result.failed] == [1]
    assert result.sequence_ids == [2]


# A real shard


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def shards(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ShardProcess]]:
    """Two ranks: one chooses, the other waits for it."""
    with running(checkpoint, tmp_path_factory.mktemp("run"), world_size=2) as ranks:
        yield ranks
    for rank in ranks:
        assert "Traceback" not in rank.log_path.read_text()


def first_plan() -> pb.StepPlan:
    return pb.StepPlan(
        step_id=1,
        add=[add(1, [1, 2, 3])],
        run_sequence_ids=[1],
        run_num_tokens=[3],
        run_num_new_blocks=[1],
        new_block_ids=[0],
        await_masks=True,
    )


def decode_plan(step_id: int) -> pb.StepPlan:
    return pb.StepPlan(
        step_id=step_id, run_sequence_ids=[1], run_num_tokens=[1], run_num_new_blocks=[0], await_masks=True
    )


def test_masks_come_after_plans_that_ran_ahead(shards: list[ShardProcess]) -> None:
    warm_up(shards)
    stream = RunStream(shards)
    stream.send(first_plan())
    stream.send(decode_plan(2))
    chosen = []
    for step_id, token_id in enumerate((70, 71, 72, 73), 1):
        stream.send_masks(pb.Masks(step_id=step_id, sequence_ids=[1], bits=bits(token_id)))
        chosen.extend(stream.receive().token_ids)
        stream.send(decode_plan(step_id + 2))
    # The sequence has ended: its masks no longer come, its step runs all the same.
    stream.send_masks(pb.Masks(step_id=5))
    assert len(stream.receive().token_ids) == 1
    stream.send_masks(pb.Masks(step_id=6))
    assert len(stream.receive().token_ids) == 1
    stream.close()
    assert chosen == [70, 71, 72, 73]


def test_a_stream_that_breaks_wakes_the_step_that_waits(shards: list[ShardProcess]) -> None:
    warm, _ = warm_up(shards)
    undisturbed = run_all(shards, warm.block_size)
    began_at = time.monotonic()
    for ending in ("break", "another stream", "break"):
        stream = RunStream(shards)
        stream.send(first_plan())
        stream.send(decode_plan(2))
        time.sleep(0.2)
        if ending == "break":
            stream.break_off()
        assert run_all(shards, warm.block_size) == undisturbed
        if ending != "break":
            with pytest.raises(grpc.RpcError, match="another Run stream has been opened"):
                stream.receive()
            stream.break_off()
    assert time.monotonic() - began_at < 30


@pytest.mark.parametrize(
    ("masks", "complaint"),
    [
        (pb.Masks(step_id=7, sequence_ids=[1], bits=bits(1)), "masks of step 7, which awaits none"),
        (pb.Masks(step_id=1, sequence_ids=[1], bits=b"\xff"), "1 bytes of bits for 1 sequence_ids"),
        (None, "no masks have come for the steps"),
    ],
)
def test_masks_that_do_not_fit_end_the_stream(
    shards: list[ShardProcess], masks: pb.Masks | None, complaint: str
) -> None:
    warm_up(shards)
    stream = RunStream(shards)
    stream.send(first_plan())
    if masks is not None:
        stream.send_masks(masks)
    else:
        for plans in stream._plans:
            plans.put(None)
    with pytest.raises(grpc.RpcError, match=complaint):
        next(stream.calls[0])
    stream.break_off()
