"""Two ranks over gloo compute what one computes: one pair of processes runs all families."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor
from transformers import AutoConfig

import tiny_models
from model_steps import Row, Stepper
from tgi_shard.distributed import SINGLE, Group, close_group, init_group
from tgi_shard.models.registry import load_model
from tgi_shard.weights.checkpoint import Checkpoint

CPU = torch.device("cpu")
WORLD_SIZE = 2
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    model_type: (model_type, {}) for model_type in tiny_models.DECODERS
} | {
    "one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
}


def run(checkpoint: Path, group: Group) -> Tensor:
    """A ragged prefill, a prompt in two chunks, decodes: all their logits."""
    loaded = load_model(checkpoint, dtype=None, device=CPU, group=group)
    assert loaded.model.kv_shape.local_num_kv_heads == max(1, _num_kv_heads(checkpoint) // group.world_size)
    stepper = Stepper(loaded)
    rows, logits = stepper.prefill(tiny_models.prompts((1, 7, 33)))
    late = Row(tiny_models.prompts((50,))[0])
    chunk = stepper.step([(late, 30)])
    decodes = [stepper.decode(rows, logits[[0, 7, 40]])]
    for _ in range(6):
        decodes.append(stepper.decode(rows, decodes[-1]))
    return torch.cat([logits, chunk, stepper.step([(late, 20)]), *decodes])


def _num_kv_heads(checkpoint: Path) -> int:
    config = AutoConfig.from_pretrained(checkpoint)
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _rank(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    group = init_group(rank, WORLD_SIZE, CPU, "127.0.0.1", port, timeout_s=60)
    try:
        if rank == 0:
            (folder / "listening").write_text(_listening_addresses())
        assert group.all_reduce_min(7 + rank) == 7
        assert group.broadcast(torch.full((2,), rank)).tolist() == [0, 0]
        assert group.all_gather(torch.full((1, 2), rank)).tolist() == [[0, 0, 1, 1]]
        assert group.all_reduce(torch.full((3,), rank + 1.0, dtype=torch.bfloat16)).tolist() == [3.0] * 3
        assert group.all_gather(torch.full((1, 1), rank, dtype=torch.bfloat16)).tolist() == [[0.0, 1.0]]
        assert group.all_gather(torch.empty(0, 4)).shape == (0, 8)
        for case in CASES:
            torch.save(run(folder / case, group), folder / f"{case}.{rank}.pt")
    finally:
        close_group(group)


def _listening_addresses() -> str:
    """Local addresses of this process's listening TCP sockets, one a line, in the kernel's hexadecimal."""
    own = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            own.add(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue  # the listing's own
    lines = []
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                lines.append(fields[1])
    return "\n".join(lines)


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every case's checkpoint and both ranks' logits."""
    folder = tmp_path_factory.mktemp("parallel")
    for case, (model_type, overrides) in CASES.items():
        tiny_models.save(model_type, folder / case, **overrides)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    torch.multiprocessing.start_processes(_rank, args=(port, folder), nprocs=WORLD_SIZE, start_method="spawn")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(case: str, parallel: Path) -> None:
    alone = run(parallel / case, SINGLE)
    first, second = (torch.load(parallel / f"{case}.{rank}.pt") for rank in range(WORLD_SIZE))
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-4)
    assert torch.equal(first.argmax(-1), alone.argmax(-1))
    assert torch.equal(first, second), "every rank must sample from the same numbers"


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="reads Linux's list of sockets")
def test_ranks_on_this_machine_listen_on_the_loopback_address_alone(parallel: Path) -> None:
    addresses = [line.split(":")[0] for line in (parallel / "listening").read_text().splitlines()]
    assert addresses, "rank 0 holds the store"
    assert set(addresses) <= {"0100007F", "0" * 24 + "01000000"}


def test_a_rank_reads_no_more_than_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elements read, as cut: what both ranks share is norms and the biases of rank 0."""
    tiny_models.save("llama", tmp_path)
    num_read = 0
    read: Callable[..., Tensor] = Checkpoint.read

    def counting(self: Checkpoint, name: str, ranges: dict[int, tuple[int, int]]) -> Tensor:
        nonlocal num_read
        part = read(self, name, ranges)
        num_read += part.numel()
        return part

    monkeypatch.setattr(Checkpoint, "read", counting)
    load_model(tmp_path, dtype=None, device=CPU, group=SINGLE)
    whole, num_read = num_read, 0
    load_model(tmp_path, dtype=None, device=CPU, group=Group(1, WORLD_SIZE))
    assert num_read < 0.51 * whole
