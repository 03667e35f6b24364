"""PyTorch weight files -> safetensors: the same tensors, safely read, each once."""

import json
import logging
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny_models
from tgi_shard import model_folder
from tgi_shard.model_folder import ModelError
from tgi_shard.weights import convert


def save(path: Path, **tensors: torch.Tensor) -> Path:
    torch.save({name.replace("__", "."): tensor for name, tensor in tensors.items()}, path)
    return path


def test_values_dtypes_and_layouts_survive(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "half": base.half(),
        "brain": base.bfloat16(),
        "transposed": base.t(),
        "sliced": base[1:3, 2:4],
        "not_a_number": torch.tensor([float("nan"), 1.0]),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 5),
        "other_empty": torch.empty(0, 5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    convert.convert_files([save(tmp_path / "pytorch_model.bin", **tensors)], tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(
            written[name], tensor.detach().contiguous(), rtol=0, atol=0, equal_nan=True
        )


def test_a_training_checkpoint_is_unwrapped(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "pytorch_model.bin")
    convert.convert_files([tmp_path / "pytorch_model.bin"], tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == {"a"}


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, zipped: bool) -> None:
    trace = tmp_path / "trace"

    class Malicious:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(trace),))

    source = tmp_path / "pytorch_model.bin"
    torch.save({"a": Malicious()}, source, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match="it is refused"):
        convert.convert_files([source], tmp_path)
    source.write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(ModelError, match="it is refused"):
        convert.convert_files([source], tmp_path)
    assert not trace.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": "text"}, {"a": [torch.ones(1)]}])
def test_files_that_hold_no_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(ModelError, match=r"x\.bin"):
        convert.convert_files([tmp_path / "x.bin"], tmp_path)


def test_a_damaged_file(tmp_path: Path) -> None:
    source = save(tmp_path / "x.bin", a=torch.ones(1000))
    source.write_bytes(source.read_bytes()[:2000])
    with pytest.raises(ModelError, match=r"x\.bin"):
        convert.convert_files([source], tmp_path)


def test_a_tied_name_is_left_out_and_noted(tmp_path: Path) -> None:
    shared = torch.rand(4, 3)
    source = save(tmp_path / "pytorch_model.bin", lm_head__weight=shared, model__embed__weight=shared)
    convert.convert_files([source], tmp_path, tied_patterns=(r"lm_head\.weight",))
    assert load_file(tmp_path / "model.safetensors").keys() == {"model.embed.weight"}
    with safe_open(tmp_path / "model.safetensors", framework="pt") as written:
        assert written.metadata() == {"format": "pt", "lm_head.weight": "model.embed.weight"}


def test_shared_memory_without_a_tie_is_written_for_each_name(tmp_path: Path) -> None:
    """Whoever reads the file asks for both: nothing tells that one is the other."""
    shared = torch.rand(4, 3)
    convert.convert_files([save(tmp_path / "m.bin", a=shared, b=shared, c=shared[:2])], tmp_path)
    written = load_file(tmp_path / "m.safetensors")
    torch.testing.assert_close(written, {"a": shared, "b": shared, "c": shared[:2]}, rtol=0, atol=0)


@pytest.mark.parametrize(("model_type", "tied"), [("qwen2", True), ("llama", False), ("gpt2", True)])
def test_a_converted_model_is_the_same_model(
    tmp_path: Path, model_type: str, tied: bool, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_models.save(model_type, tmp_path)
    original = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(original.state_dict())
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for i, half in enumerate(halves):
        torch.save(
            {name: original.state_dict()[name] for name in half},
            folder / f"pytorch_model-{i + 1:05}-of-00002.bin",
        )

    sources = model_folder.local_weights(folder)
    assert [path.suffix for path in sources] == [".bin", ".bin"]
    with caplog.at_level(logging.INFO):
        targets = convert.convert_files(sources, folder, convert.tied_patterns(folder))
    assert [path.name for path in targets] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert "Convert: [1/2] -- Took: 0:00:00" in caplog.text
    assert model_folder.local_weights(folder) == targets
    assert bool(convert.tied_patterns(folder)) == tied

    for source in sources:
        source.unlink()
    again = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(dict(again.state_dict()), dict(original.state_dict()), rtol=0, atol=0)


def test_a_conversion_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    sources = [
        save(tmp_path / f"pytorch_model-0000{i}-of-00002.bin", **{f"t{i}": torch.rand(3)}) for i in (1, 2)
    ]
    convert.convert_file(sources[0], tmp_path / "model-00001-of-00002.safetensors")
    finished_at = (tmp_path / "model-00001-of-00002.safetensors").stat().st_mtime_ns
    assert model_folder.local_weights(tmp_path) == sources, "one of two files is not a model"
    targets = convert.convert_files(sources, tmp_path)
    assert targets[0].stat().st_mtime_ns == finished_at
    assert model_folder.local_weights(tmp_path) == targets
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"t1": targets[0].name, "t2": targets[1].name}


def test_a_changed_source_is_converted_again(tmp_path: Path) -> None:
    source = save(tmp_path / "pytorch_model.bin", a=torch.zeros(2))
    convert.convert_files([source], tmp_path)
    save(source, a=torch.ones(2))
    later = (tmp_path / "model.safetensors").stat().st_mtime + 10
    os.utime(source, (later, later))
    convert.convert_files([source], tmp_path)
    assert load_file(tmp_path / "model.safetensors")["a"].tolist() == [1.0, 1.0]
