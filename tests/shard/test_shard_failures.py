"""A step that raises, in a real shard process: the stream ends, the process goes on if it can."""

from pathlib import Path

import grpc
import pytest
from test_shard_service import RunStream, add, run_all, warm_up

import tiny_models
from broken_shard import BUG_TOKEN, HUGE_TOKEN, running_broken
from tgi_proto import generate_pb2 as pb


def plan_of(token_id: int) -> pb.StepPlan:
    return pb.StepPlan(
        step_id=1,
        add=[add(1, [5, token_id]), add(2, [6, 7])],
        run_sequence_ids=[1, 2],
        run_num_tokens=[2, 2],
        run_num_new_blocks=[1, 1],
        new_block_ids=[0, 1],
    )


def test_a_step_that_raises_ends_the_stream_and_not_the_process(tmp_path: Path) -> None:
    checkpoint = tiny_models.save("llama", tmp_path / "model")
    with running_broken(checkpoint, tmp_path) as shard:
        (warm,) = warm_up([shard])
        expected = run_all([shard], warm.block_size)
        for token_id, code, message in (
            (BUG_TOKEN, grpc.StatusCode.INTERNAL, "RuntimeError: a bug in a kernel"),
            (HUGE_TOKEN, grpc.StatusCode.RESOURCE_EXHAUSTED, "OutOfMemoryError: no memory is left"),
        ):
            for _ in range(3):
                stream = RunStream([shard])
                stream.send(plan_of(token_id))
                # The next one is there already, as ever. It must not run.
                stream.send(
                    pb.StepPlan(step_id=2, run_sequence_ids=[2], run_num_tokens=[1], run_num_new_blocks=[0])
                )
                with pytest.raises(grpc.RpcError, match=message) as failure:
                    stream.receive()
                assert failure.value.code() is code
                stream.break_off()
            assert run_all([shard], warm.block_size) == expected
        assert shard.process.poll() is None


def test_a_process_in_which_every_step_raises_ends(tmp_path: Path) -> None:
    checkpoint = tiny_models.save("llama", tmp_path / "model")
    with running_broken(checkpoint, tmp_path) as shard:
        warm_up([shard])
        for _ in range(16):
            stream = RunStream([shard])
            stream.send(plan_of(BUG_TOKEN))
            with pytest.raises(grpc.RpcError, match="a bug in a kernel"):
                stream.receive()
            stream.break_off()
        assert shard.process.wait(20) not in (0, None)
