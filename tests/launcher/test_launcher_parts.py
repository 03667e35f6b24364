"""The launcher's small parts: lines, levels, restarts, devices."""

import random
from pathlib import Path

import pytest

from tgi_launcher import devices
from tgi_launcher.logs import MAX_LINE_BYTES, Level, Lines, Tail, level_from
from tgi_launcher.restarts import Restarts


def test_lines_come_whole_however_the_reads_fall() -> None:
    random_ = random.Random(0)
    for _ in range(200):
        lines = [bytes(random_.choices(b"ab\xc3\xa9", k=random_.randrange(9))) for _ in range(8)]
        stream = b"\n".join(lines)
        cutter, out, place = Lines(), [], 0
        while place < len(stream):
            size = random_.randrange(1, 6)
            out += cutter.feed(stream[place : place + size])
            place += size
        out += cutter.end()
        assert out == (lines if lines[-1] else lines[:-1])


def test_a_line_without_end_does_not_fill_the_memory() -> None:
    cutter = Lines()
    out = [piece for _ in range(40) for piece in cutter.feed(b"x" * 65536)]
    assert sum(map(len, out)) + sum(map(len, cutter.end())) == 40 * 65536
    assert max(map(len, out)) <= MAX_LINE_BYTES + 65536


def test_only_the_end_of_stderr_is_kept() -> None:
    tail = Tail()
    for number in range(100_000):
        tail.feed(b"%06d\n" % number)
    assert tail.text().endswith("099998\n099999\n")
    assert len(tail.text()) == 1 << 16


@pytest.mark.parametrize(
    ("expression", "level"),
    [
        (None, Level.INFO),
        ("warn", Level.WARN),
        ("DEBUG", Level.DEBUG),
        ("info,text_generation_router=debug", Level.INFO),
        ("info,text_generation_launcher=error", Level.ERROR),
        ("text_generation_router=debug", Level.INFO),
        ("nonsense", Level.INFO),
    ],
)
def test_level(expression: str | None, level: Level) -> None:
    assert level_from(expression) == level


def test_restarts_back_off_and_start_anew_after_a_healthy_minute() -> None:
    restarts = Restarts(max_restarts=10)
    delays = [restarts.delay_s(served_s=59) for _ in range(11)]
    assert delays == [0, 0.25, 0.5, 1, 2, 4, 8, 16, 30, 30, None]
    restarts = Restarts(max_restarts=2)
    assert [restarts.delay_s(served_s) for served_s in (1, 1, 60, 1, 1)] == [0, 0.25, 0, 0.25, None]
    assert Restarts(max_restarts=0).delay_s(served_s=1000) is None


@pytest.mark.parametrize(
    ("environ", "num_visible"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1,5"}, 3),
        ({"CUDA_VISIBLE_DEVICES": ""}, 1),
        ({"CUDA_VISIBLE_DEVICES": "0", "NVIDIA_VISIBLE_DEVICES": "0,1"}, 1),
        ({"NVIDIA_VISIBLE_DEVICES": "0,1"}, 2),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, 4),
        ({"NVIDIA_VISIBLE_DEVICES": "void"}, 4),
        ({"ZE_AFFINITY_MASK": "0,1"}, 2),
    ],
)
def test_visible_devices(
    environ: dict[str, str], num_visible: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, monkeypatch, "echo GPU-a; echo GPU-b; echo GPU-c; echo GPU-d")
    assert devices.detect(environ).num_visible == num_visible


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_the_first_gpu_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(
        tmp_path,
        monkeypatch,
        'case "$1" in *gpu_name) echo NVIDIA H200; echo NVIDIA T4;; *memory*) echo 143771; echo 15360;; esac',
    )
    monkeypatch.setattr(devices, "version", lambda _: "2.13.0")
    found = devices.detect({})
    assert (found.card, found.memory_bytes) == ("nvidia-h200", 143771 << 20)
    assert devices.detect({"CUDA_VISIBLE_DEVICES": "-1"}).card is None
    monkeypatch.setattr(devices, "version", lambda _: "2.13.0+cpu")
    assert devices.detect({}).card is None
    nvidia_smi(tmp_path, monkeypatch, "echo cannot talk to the driver; exit 9")
    monkeypatch.setattr(devices, "version", lambda _: "2.13.0")
    assert devices.detect({"NVIDIA_VISIBLE_DEVICES": "all"}).num_visible is None
    assert devices.detect({}).card is None


def test_a_container_s_quota_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: set(range(16)))
    for text, num_cores in (
        ("max 100000", 16),
        ("250000 100000", 3),
        ("5000 100000", 1),
        ("9900000 100000", 16),
    ):
        (tmp_path / "cpu.max").write_text(f"{text}\n")
        monkeypatch.setattr(devices, "CGROUP_CPU_MAX", tmp_path / "cpu.max")
        assert devices.detect({}).num_cores == num_cores
