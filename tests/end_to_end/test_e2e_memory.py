"""`--plan` promises what the start then does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import Launch

LAUNCHER = Path(sys.executable).with_name("text-generation-launcher")


def printed_plan(*args: str) -> tuple[int, str]:
    done = subprocess.run([str(LAUNCHER), "--plan", *args], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def figures(text: str) -> list[str]:
    """Weights, blocks and room, of the first plan in `text`; not the reserve, which changes by the second."""
    found = re.search(r"  weights  .*\n.*KV blocks.*\n.*workspace.*\n.*reserve.*\n.*room for.*\)", text)
    assert found is not None, text
    return [line.strip() for line in found.group().splitlines() if "reserve" not in line]


@pytest.mark.parametrize("num_shard", [1, 2])
def test_the_server_holds_what_the_plan_says(launch: Launch, tiny_llama: Path, num_shard: int) -> None:
    args = ("--num-shard", str(num_shard), "--max-total-tokens", "200", "--max-concurrent-requests", "7")
    code, text = printed_plan("--model-id", str(tiny_llama), *args)
    assert code == 0, text
    with launch(*args) as server:
        assert server.log().count("Memory of this shard") == num_shard
        assert figures(server.log()) == figures(text)
        assert server.metric("tgi_kv_blocks_total") == 7 * 7


def test_a_model_that_does_not_fit_is_refused_by_the_plan(tiny_llama: Path) -> None:
    code, text = printed_plan("--model-id", str(tiny_llama), "--max-total-tokens", str(10**9))
    assert code == 1
    assert "It does not fit. Not enough memory to handle `max_total_tokens=1000000000`" in text


def test_a_model_that_does_not_fit_ends_the_start(launch: Launch) -> None:
    expected = r"(?s)exited with 1\n.*ERROR .*Not enough memory to handle `max_total_tokens=1000000000`"
    with pytest.raises(AssertionError, match=expected), launch("--max-total-tokens", str(10**9)):
        pass
