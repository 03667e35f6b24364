"""bench/start.py: a file that was dropped is gone from the page cache; a start is told phase by phase."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


def test_a_dropped_file_is_out_of_the_page_cache(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    code = (
        "import sys, start; from pathlib import Path; file = Path(sys.argv[1]);"
        "before = start.resident_share(file); start.drop([file]); after = start.resident_share(file);"
        "start.read_plainly([file]); print(before, after, start.resident_share(file))"
    )
    command = [sys.executable, "-c", code, str(file)]
    done = subprocess.run(command, cwd=BENCH, capture_output=True, text=True, timeout=60, check=False)
    if "stay in the page cache" in done.stderr:
        pytest.skip("a file system in memory keeps its pages")
    assert done.stdout.split() == ["1.0", "0.0", "1.0"]


@pytest.mark.matrix
def test_a_start_cold_and_warm(tmp_path: Path) -> None:
    model, report = tmp_path / "model", tmp_path / "report.json"
    made: list[str | Path] = [sys.executable, BENCH / "make_model.py", "tiny", model]
    subprocess.run(made, check=True, capture_output=True, timeout=120)
    measured = [sys.executable, BENCH / "start.py", "--model", model, "--repeats", "1", "--json", report]
    done = subprocess.run(measured, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    cold, warm = json.loads(report.read_text())
    assert (cold["is_cold"], warm["is_cold"]) == (True, False)
    for start in (cold, warm):
        told = start["loading_s"] + sum(start["phases"].values())
        assert 0.8 * start["total_s"] < told <= start["total_s"]
        assert start["cpu_s"] > 1
    assert "| launcher start to ready, s |" in done.stdout
