"""A real shard process with a model that two tokens break."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tiny_models
from shard_process import ShardProcess

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
