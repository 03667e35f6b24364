"""While a rank loads, its memory peaks at little more than the weights that it keeps."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny_models

# Large beside what else a process allocates, small enough to be made in a second.
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 14,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

# Anonymous memory: the pages of the mapped checkpoint are the system's, shared by all ranks, and go when
# somebody needs them. A thread looks all the time, and the loader's own progress at every tensor.
LOADER = """
import sys, threading
from pathlib import Path
import torch
from tgi_shard.distributed import Group
from tgi_shard.memory import held_bytes, tensors_in
from tgi_shard.models import registry

def anonymous_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024

def note(*_):
    global peak
    peak = max(peak, anonymous_bytes())

def watch():
    while not done.wait(0.0005):
        note()

small, path, rank, world_size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
options = dict(dtype=torch.bfloat16, device=torch.device("cpu"))
registry.load_model(small, group=Group(0, 1), **options)  # what a first load leaves behind is no weight
peak = before = anonymous_bytes()
done = threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
loaded = registry.load_model(path, group=Group(rank, world_size), progress=note, **options)
done.set()
watcher.join()
print(peak - before, held_bytes(loaded.model))
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("llama", tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("llama", tmp_path_factory.mktemp("model"), dtype=request.param, **SIZES)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_peak_stays_under_the_weights_and_15_percent(
    checkpoint: Path, world_size: int, small: Path
) -> None:
    arguments = [str(small), str(checkpoint), str(world_size - 1), str(world_size)]
    done = subprocess.run(
        [sys.executable, "-c", LOADER, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    peak, own = map(int, done.stdout.split())
    assert own > 50_000_000 / world_size
    assert 0.9 * own < peak < 1.15 * own
