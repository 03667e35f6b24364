"""Real servers for the end-to-end tests: one launcher process each, on free ports, gone at the end."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tiny_models
from server import Server

Launch = Callable[..., Server]


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama-shaped checkpoint in float32 that never ends by itself: answers run to their length."""
    return endless("llama", tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_mamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in the shape of a recurrent model."""
    return endless("mamba", tmp_path_factory.mktemp("tiny-mamba"))


def endless(model_type: str, path: Path) -> Path:
    tiny_models.save(model_type, path, seed=3)
    tiny_models.never_ends(path)
    return path


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Launch:
    """Make a server that is not started yet: `with launch("--num-shard", "2") as server`."""

    def make(*args: str, model: str | None = None) -> Server:
        return Server(model or str(tiny_llama), tmp_path_factory.mktemp("server"), *args)

    return make


@pytest.fixture(scope="module")
def demo_server(launch: Launch) -> Iterator[Server]:
    with launch(model="demo") as server:
        yield server
