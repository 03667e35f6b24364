"""A step that raises, in a real shard process: the stream ends, the process goes on if it can."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from test_shard_service import RunStream, add, run_all, warm_up

import tiny_models
from shard_process import ShardProcess
from tgi_proto import generate_pb2 as pb

BUG_TOKEN, HUGE_TOKEN = tiny_models.BOS_ID, tiny_models.PAD_ID  # no prompt of the others has them

# The real command, with a model that two tokens break.
BROKEN_SHARD = f"""
import torch
from tgi_shard.main import main
from tgi_shard.models.decoder import Decoder as Model

forward = Model.forward

def broken(self, inputs, *args):
    if (inputs.token_ids == {BUG_TOKEN}).any():
        raise RuntimeError("a bug in a kernel")
    if (inputs.token_ids == {HUGE_TOKEN}).any():
        raise torch.OutOfMemoryError("no memory is left")
    return forward(self, inputs, *args)

Model.forward = broken
main()
"""


@contextmanager
def running_broken(checkpoint: Path, folder: Path) -> Iterator[ShardProcess]:
    argv = [sys.executable, "-c", BROKEN_SHARD, "serve", str(checkpoint), "--uds-path", str(folder / "s")]
    with (folder / "0.log").open("w") as log:
        environment = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(argv, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)
    shard = ShardProcess(process, folder / "s-0", folder / "0.log")
    try:
        shard.wait_until_ready()
        yield shard
    finally:
        shard.process.send_signal(signal.SIGTERM)
        shard.wait_until_ended()


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
