"""The soak: a short one over a real server, and that it would see a leak."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SOAK = Path(__file__).parents[2] / "bench" / "soak.py"


@pytest.fixture(scope="module")
def soak() -> dict[str, Any]:
    return runpy.run_path(str(SOAK))


def test_a_short_soak_leaks_no_block_and_no_permit(tmp_path: Path) -> None:
    command = [sys.executable, str(SOAK), "--minutes", "0.1", "--json", str(tmp_path / "report.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode in (0, 1), done.stderr  # memory still grows in the first seconds
    report = json.loads((tmp_path / "report.json").read_text())
    assert [process["name"] for process in report["processes"]] == ["launcher", "router", "shard 0"]
    assert report["kv_blocks_used"] == report["permits_missing"] == 0
    assert set(report["requests"]) >= {"done", "aborted", "refused"}
    assert "failed" not in report["requests"], report["problems"]
    assert all("grows by" in problem for problem in report["problems"])


def test_the_slope_is_that_of_the_memory(soak: dict[str, Any]) -> None:
    samples = [
        soak["Sample"](at=60.0 * i, rss_mb=100 + 2.5 * i, num_files=3, num_threads=2) for i in range(9)
    ]
    assert soak["slope_per_min"](samples) == pytest.approx(2.5)
    assert soak["slope_per_min"](samples[:1]) == 0


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({}, None),
        ({"slope_mb_per_min": 1.5}, "shard 0 grows by 1.50 MB/min"),
        ({"files_after": 20}, "shard 0 has 20 open files, 10 before"),
        ({"threads_after": 9}, "shard 0 has 9 threads, 4 before"),
    ],
)
def test_what_grows_is_named(soak: dict[str, Any], changed: dict[str, float], problem: str | None) -> None:
    fields = {"slope_mb_per_min": 0.4, "rss_mb": 500.0, "files_before": 10, "files_after": 12}
    threads = {"threads_before": 4, "threads_after": 5}
    report = soak["ProcessReport"](name="shard 0", **fields | threads | changed)
    assert report.problems() == ([] if problem is None else [problem])
