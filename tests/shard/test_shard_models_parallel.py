"""Ranks over gloo compute what one computes: one set of processes runs all families."""

import os
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

import tiny_models
from model_steps import Row, Stepper
from tgi_shard.distributed import SINGLE, Group, close_group, init_group
from tgi_shard.models.registry import load_model
from tgi_shard.weights.checkpoint import Checkpoint

CPU = torch.device("cpu")
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in tiny_models.FAMILIES}
ENCODER_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, {}) for name in tiny_models.ENCODER_DECODERS
} | tiny_models.ENCODER_DECODER_VARIANTS
CASES = {  # number of ranks -> what they run
    2: FAMILIES
    | ENCODER_DECODERS
    | {
        variant: tiny_models.VARIANTS[variant]
        for variant in (
            *("llama-one-kv-head", "llama-biases", "cohere-qk-norm", "stablelm-parallel", "opt-350m"),
            *("olmo2-one-kv-head", "falcon-40b", "falcon-rw", "gpt_bigcode-many-kv-heads", "bloom-six-heads"),
            *("baichuan-2-13b-six-heads", "gpt_oss-mxfp4"),
        )
    },
    4: {
        case: of
        for case, of in (FAMILIES | ENCODER_DECODERS | tiny_models.VARIANTS).items()
        if not case.endswith("six-heads")
    },
}
ALL = [
    pytest.param(world_size, case, marks=pytest.mark.matrix if world_size == 4 else [])
    for world_size, cases in CASES.items()
    for case in cases
]


def run(checkpoint: Path, group: Group) -> Tensor:
    """A ragged prefill, a prompt in two chunks, decodes: all their logits."""
    loaded = load_model(checkpoint, dtype=None, device=CPU, group=group)
    stepper = Stepper(loaded)
    if loaded.decoder_start_token_ids:
        return _run_encoder_decoder(stepper, list(loaded.decoder_start_token_ids))
    rows, logits = stepper.prefill(tiny_models.prompts((1, 7, 33)))
    late = Row(tiny_models.prompts((50,))[0])
    chunk = stepper.step([(late, 30)])
    decodes = [stepper.decode(rows, logits[[0, 7, 40]])]
    for _ in range(2):
        decodes.append(stepper.decode(rows, decodes[-1]))
    return torch.cat([logits, chunk, stepper.step([(late, 20)]), *decodes])


def _run_encoder_decoder(stepper: Stepper, start: list[int]) -> Tensor:
    """Ragged prompts, decodes, and an answer that is taken up again beside them."""
    rows = [Row(prompt + start) for prompt in tiny_models.prompts((1, 7, 33))]
    logits = [stepper.step([(row, len(row.token_ids)) for row in rows])]
    for _ in range(3):
        logits.append(stepper.decode(rows, logits[-1]))
    prompt, answer = tiny_models.prompts((50, 9))
    resumed = Row([*prompt, *start, *answer], prompt_len=51)
    for row in rows:
        row.token_ids.append(3)
    logits.append(stepper.step([(resumed, 60), *((row, 1) for row in rows)]))
    return torch.cat(logits)


def _rank(rank: int, world_size: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    group = init_group(rank, world_size, CPU, "127.0.0.1", port, timeout_s=60)
    try:
        if rank == 0:
            (folder / "listening").write_text(_listening_addresses())
        ranks = range(world_size)
        assert group.all_reduce_min(7 + rank) == 7
        assert group.broadcast(torch.full((2,), rank)).tolist() == [0, 0]
        assert group.all_gather(torch.full((1, 2), rank)).tolist() == [[r for r in ranks for _ in range(2)]]
        summed = group.all_reduce(torch.full((3,), rank + 1.0, dtype=torch.bfloat16))
        assert summed.tolist() == [sum(ranks) + world_size] * 3
        gathered = group.all_gather(torch.full((1, 1), rank, dtype=torch.bfloat16))
        assert gathered.tolist() == [[float(r) for r in ranks]]
        assert group.all_gather(torch.empty(0, 4)).shape == (0, 4 * world_size)
        for case in CASES[world_size]:
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
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """For a number of ranks: a folder with every case's checkpoint and all ranks' logits, made once."""

    @cache
    def run_all(world_size: int) -> Path:
        folder = tmp_path_factory.mktemp("parallel")
        for case, (model_type, overrides) in CASES[world_size].items():
            tiny_models.save(model_type, folder / case, **overrides)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        arguments = (world_size, port, folder)
        torch.multiprocessing.start_processes(_rank, arguments, nprocs=world_size, start_method="spawn")
        return folder

    return run_all


@pytest.mark.parametrize(("world_size", "case"), ALL)
def test_ranks_together_equal_one(world_size: int, case: str, parallel: Callable[[int], Path]) -> None:
    folder = parallel(world_size)
    alone = run(folder / case, SINGLE)
    first, *others = (torch.load(folder / f"{case}.{rank}.pt") for rank in range(world_size))
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-4)
    assert torch.equal(first.argmax(-1), alone.argmax(-1))
    for other in others:
        assert torch.equal(first, other), "every rank must sample from the same numbers"


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="reads Linux's list of sockets")
def test_ranks_on_this_machine_listen_on_the_loopback_address_alone(
    parallel: Callable[[int], Path],
) -> None:
    addresses = [line.split(":")[0] for line in (parallel(2) / "listening").read_text().splitlines()]
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
    load_model(tmp_path, dtype=None, device=CPU, group=Group(1, 2))
    assert num_read < 0.51 * whole
