"""Every family, on one rank and on several over gloo, by every way in which an answer comes about.

One set of processes runs all cases of a number of ranks: those of `make test`, or the rest of the matrix.
"""

import os
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

import matrix
import tiny_models
import ways
from model_steps import Stepper
from tgi_shard.distributed import SINGLE, Group, close_group, init_group
from tgi_shard.models.registry import load_model
from tgi_shard.weights.checkpoint import Checkpoint

pytestmark = pytest.mark.timeout(1200)  # the first test of a run waits for all of its cases

CPU = torch.device("cpu")
TESTS = [
    pytest.param(
        *(run, name, dtype, way),
        id=f"{run.num_ranks}-{name}-{dtype}-{way}",
        marks=[] if run.is_quick else pytest.mark.matrix,
    )
    for run in matrix.RUNS
    for name, case in run.cases.items()
    for dtype, way in run.ways(case)
]


def compute(folder: Path, run: matrix.Run, name: str, group: Group) -> None:
    """Write `folder`/<dtype>/<way>.<rank>.pt: this rank's answers."""
    case = run.cases[name]
    ways_of: dict[str, list[str]] = {}
    for dtype, way in run.ways(case):
        ways_of.setdefault(dtype, []).append(way)
    for dtype, names in ways_of.items():
        loaded = load_model(
            folder / dtype,
            dtype=None,
            device=CPU,
            group=group,
            through_transformers=case.through_transformers,
        )
        for way in names:
            answers = ways.WAYS[way](ways.Writer(Stepper(loaded)))
            torch.save(answers, folder / dtype / f"{way}.{group.rank}.pt")


def _rank(rank: int, run: matrix.Run, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    world_size = run.num_ranks
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
        for name in run.cases:
            compute(folder / name, run, name, group)
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


Computed = Callable[[matrix.Run, str], Path]


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Computed:
    """The folder of a run's case: its checkpoints, and all ranks' answers."""

    @cache
    def of_run(run: matrix.Run) -> Path:
        folder = tmp_path_factory.mktemp("run")
        if run.num_ranks == 1:
            return folder
        for name, case in run.cases.items():
            case.save(folder / name)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        torch.multiprocessing.start_processes(
            _rank, (run, port, folder), nprocs=run.num_ranks, start_method="spawn"
        )
        return folder

    @cache
    def of_case(run: matrix.Run, name: str) -> Path:
        folder = of_run(run) / name
        if run.num_ranks == 1:
            run.cases[name].save(folder)
            compute(folder, run, name, SINGLE)
        return folder

    return of_case


@pytest.mark.parametrize(("run", "name", "dtype", "way"), TESTS)
def test_an_answer_is_that_of_transformers(
    run: matrix.Run, name: str, dtype: str, way: str, computed: Computed
) -> None:
    checkpoint = computed(run, name) / dtype
    first, *others = (
        torch.load(checkpoint / f"{way}.{rank}.pt", weights_only=False) for rank in range(run.num_ranks)
    )
    for other in others:
        for answer, same in zip(first, other, strict=True):
            assert torch.equal(answer.scores, same.scores), "every rank must sample from the same numbers"
    if dtype == "bfloat16":
        _assert_near(first, run.cases[name].model_type, checkpoint)
    else:
        _assert_equal(first, checkpoint)


def _assert_equal(answers: list[ways.Answer], checkpoint: Path) -> None:
    oracle = tiny_models.oracle(checkpoint)
    for answer in answers:
        theirs = ways.expected(oracle, answer)
        torch.testing.assert_close(answer.scores, theirs, rtol=1e-4, atol=1e-4)
        assert answer.said == theirs.argmax(-1).tolist()


def _assert_near(answers: list[ways.Answer], model_type: str, checkpoint: Path) -> None:
    """Against float32 on the same weights: no further off than 1.5 times what transformers is.

    Of the token in the middle, since rounding may choose another of two experts that are almost equally good.
    PhiMoE's router also cuts off at a threshold: rounding alters more than half of the tokens, those of
    transformers too. There it is the token at the first quarter.
    """
    exact, rounded = tiny_models.oracle(checkpoint), tiny_models.oracle(checkpoint, torch.bfloat16)
    reference = torch.cat([ways.expected(exact, answer) for answer in answers])
    ours = torch.cat([answer.scores for answer in answers])
    theirs = torch.cat([ways.expected(rounded, answer).float() for answer in answers])
    our_error, their_error = (
        (logits - reference).square().mean(-1).sqrt().quantile(0.25 if model_type == "phimoe" else 0.5)
        for logits in (ours, theirs)
    )
    assert our_error < 1.5 * their_error


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="reads Linux's list of sockets")
def test_ranks_on_this_machine_listen_on_the_loopback_address_alone(
    computed: Computed,
) -> None:
    listening = computed(matrix.Run(2, is_quick=True), "llama").parent / "listening"
    addresses = [line.split(":")[0] for line in listening.read_text().splitlines()]
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
