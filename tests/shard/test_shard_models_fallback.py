"""What the transformers fallback refuses, and code that comes with a model; its numbers: parity tests."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.dynamic_module_utils
from safetensors.torch import load_file, save_file

import tiny_models
from model_steps import Stepper
from tgi_shard.distributed import SINGLE, Group
from tgi_shard.memory import held_bytes
from tgi_shard.models.registry import LoadedModel, UnsupportedModel, load_model
from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.weights.checkpoint import CheckpointError


def load(path: Path, **options: Any) -> LoadedModel:
    return load_model(path, **{"dtype": None, "device": torch.device("cpu"), "group": SINGLE} | options)


def config_alone(path: Path, model_type: str, **fields: Any) -> Path:
    """A folder without weights: who reads them anyway gets another error than the one expected."""
    sizes = tiny_models._COMMON | {"vocab_size": 263}
    (path / "config.json").write_text(json.dumps({"model_type": model_type} | sizes | fields))
    return path


@pytest.mark.parametrize(
    ("model_type", "fields", "sentence"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "has conv layers"),
        ("minimax", {}, "has linear_attention layers"),
        ("biogpt", {}, "does not let attention be replaced"),
        ("bert", {}, "not causal"),
        ("pegasus", {}, "has an encoder"),
        ("hrm_text", {}, "cannot run on paged attention"),
        ("doge", {}, "cannot run on paged attention"),
        (
            "helium",
            {"rope_parameters": tiny_models.ROPE | {"rope_type": "dynamic", "factor": 2.0}},
            "dynamic",
        ),
        ("no_such", {}, "model type 'no_such' is not supported yet"),
        ("no_such", {"auto_map": {"AutoConfig": "a.B"}}, "runs with --trust-remote-code only"),
    ],
)
def test_refused_before_weights_are_read(
    model_type: str, fields: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModel, match=sentence):
        load(config_alone(tmp_path, model_type, **fields))


@pytest.mark.parametrize(
    ("model_type", "world_size", "sentence"),
    [
        ("helium", 4, "2 key-value heads of helium cannot be divided evenly among 4 shards"),
        ("bitnet", 2, "bitnet runs on one shard only"),
        ("dots1", 2, "dots1 runs on one shard only"),
    ],
)
def test_groups_that_cannot_share_the_model(
    model_type: str, world_size: int, sentence: str, tmp_path: Path
) -> None:
    tiny_models.save(model_type, tmp_path)
    with pytest.raises(UnsupportedModel, match=sentence):
        load(tmp_path, group=Group(0, world_size))


def test_a_rope_override_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="--rope-scaling"):
        load(config_alone(tmp_path, "helium"), rope_override=RopeOverride(2.0))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tiny_models.save("helium", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "group"),
    [("helium", SINGLE), ("helium", Group(1, 2)), ("ernie4_5", Group(0, 2)), ("dots1", SINGLE)],
)
def test_the_estimate_is_exact(model_type: str, group: Group, tmp_path: Path) -> None:
    tiny_models.save(model_type, tmp_path)
    real, planned = load(tmp_path, group=group), load(tmp_path, group=group, device=torch.device("meta"))
    assert held_bytes(planned.model) == held_bytes(real.model)
    assert planned.model.kv_shape == real.model.kv_shape


_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class TinyConfig(LlamaConfig):
    model_type = "tiny_of_its_own"


class TinyForCausalLM(LlamaForCausalLM):
    config_class = TinyConfig
"""


def test_code_that_comes_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = tiny_models.save("llama", tmp_path / "model")
    plain = load(model)
    fields = json.loads((model / "config.json").read_text())
    names = {"AutoConfig": "tiny_code.TinyConfig", "AutoModelForCausalLM": "tiny_code.TinyForCausalLM"}
    (model / "config.json").write_text(
        json.dumps(fields | {"model_type": "tiny_of_its_own", "auto_map": names})
    )
    (model / "tiny_code.py").write_text(_CODE)
    with pytest.raises(UnsupportedModel, match="--trust-remote-code"):
        load(model)
    loaded = load(model, trust_remote_code=True)
    assert loaded.model_type == "tiny_of_its_own"
    prompts = tiny_models.prompts((5, 40))
    expected, found = (Stepper(one).prefill(prompts)[1] for one in (plain, loaded))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
