"""What cannot be served is refused with a sentence that names it, where possible before weights are read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import tiny_models
from tgi_shard.distributed import SINGLE, Group
from tgi_shard.layers.rotary import inverse_frequencies
from tgi_shard.model_folder import ModelError
from tgi_shard.models.registry import LoadedModel, UnsupportedModel, load_model
from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import read_rope
from tgi_shard.weights import block_fp8, mxfp4
from tgi_shard.weights.checkpoint import Checkpoint, CheckpointError
from tgi_shard.weights.loading import Weights


def load(path: Path, **options: Any) -> LoadedModel:
    return load_model(path, **{"dtype": None, "device": torch.device("cpu"), "group": SINGLE} | options)


def without_weights(path: Path) -> Path:
    """Whoever reads them anyway gets an error about files instead of the one expected."""
    for file in path.glob("*.safetensors"):
        file.unlink()
    return path


def edit_config(path: Path, **changes: Any) -> Path:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return path


def edit_weights(path: Path, **changes: torch.Tensor | None) -> Path:
    file = path / "model.safetensors"
    tensors = load_file(file) | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, file, metadata={"format": "pt"})
    return path


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny_models.save("llama", tmp_path)


def test_what_a_loaded_model_says_of_itself(llama: Path) -> None:
    loaded = load(llama)
    assert (loaded.model_type, loaded.vocab_size, loaded.max_position_embeddings) == ("llama", 259, 512)
    assert loaded.dtype == torch.float32
    assert loaded.model.kv_shape.local_num_kv_heads == 2
    assert loaded.model.kv_shape.head_dim == 16
    assert load(llama, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "rwkv"}, "model type 'rwkv' is not supported yet"),
        ({"model_type": None}, "model type None is not supported yet"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "quantized with 'gptq' are not supported yet for llama",
        ),
        ({"hidden_act": "mish"}, "activation 'mish' is not supported"),
        ({"num_attention_heads": "four"}, "config.json in .* is no valid llama config"),
        (
            {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4, "factor": 2.0}},
            "rope scaling 'proportional' is not supported",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rotary embeddings on part of a head",
        ),
    ],
)
def test_configs_that_are_refused_before_weights_are_read(
    changes: dict[str, Any], sentence: str, llama: Path
) -> None:
    edit_config(without_weights(llama), **changes)
    with pytest.raises(UnsupportedModel, match=sentence):
        load(llama)


@pytest.mark.parametrize(
    ("world_size", "changes", "sentence"),
    [
        (3, {}, "4 attention heads cannot be divided evenly among 3 shards"),
        (2, {"intermediate_size": 113}, "113 MLP features cannot be divided evenly among 2 shards"),
        (
            4,
            {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 96},
            "6 key-value heads can neither",
        ),
    ],
)
def test_groups_that_cannot_share_the_model(
    world_size: int, changes: dict[str, Any], sentence: str, llama: Path
) -> None:
    edit_config(without_weights(llama), **changes)
    with pytest.raises(UnsupportedModel, match=sentence):
        load(llama, group=Group(0, world_size))


@pytest.mark.parametrize(
    ("model_type", "world_size", "sentence"),
    [
        ("mamba", 5, "96 channels cannot be divided evenly among 5 shards"),
        ("mamba2", 3, "8 heads cannot be divided evenly among 3 shards"),
        ("mamba2", 8, "4 groups of heads cannot be divided evenly among 8 shards"),
    ],
)
def test_groups_that_cannot_share_a_recurrent_model(
    model_type: str, world_size: int, sentence: str, tmp_path: Path
) -> None:
    without_weights(tiny_models.save(model_type, tmp_path))
    with pytest.raises(UnsupportedModel, match=sentence):
        load(tmp_path, group=Group(0, world_size))


def test_rope_scaling_of_a_recurrent_model(tmp_path: Path) -> None:
    without_weights(tiny_models.save("mamba", tmp_path))
    with pytest.raises(UnsupportedModel, match="mamba has no rotary positions"):
        load(tmp_path, rope_override=RopeOverride(2.0))


def test_rope_scaling_of_learned_positions(tmp_path: Path) -> None:
    tiny_models.save("gpt2", tmp_path)
    with pytest.raises(UnsupportedModel, match="positions are learned"):
        load(tmp_path, rope_override=RopeOverride(2.0))


def test_deepseek_stores_one_latent_a_token_on_every_rank(tmp_path: Path) -> None:
    tiny_models.save("deepseek_v3", tmp_path)
    for group in (SINGLE, Group(1, 2)):
        shape = load(tmp_path, group=group).model.kv_shape
        assert (shape.local_num_kv_heads, shape.head_dim, shape.has_values) == (1, 20 + 8, False)
        assert shape.bytes_per_block(16) == 16 * 3 * 28 * 4  # tokens x layers x features x bytes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported for deepseek_v2 models"),
        ({"norm_topk_prob": True}, "deepseek_v2 models with norm_topk_prob are not supported"),
    ],
)
def test_deepseek_v2_routings_that_are_refused(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    tiny_models.save("deepseek_v2", tmp_path)
    edit_config(without_weights(tmp_path), **changes)
    with pytest.raises(UnsupportedModel, match=sentence):
        load(tmp_path)


def test_baichuan_needs_no_code_of_its_repository(tmp_path: Path) -> None:
    tiny_models.save("baichuan", tmp_path, max_position_embeddings=None)
    names = {"AutoConfig": "configuration_baichuan.BaichuanConfig"}
    edit_config(tmp_path, auto_map=names, architectures=["BaichuanForCausalLM"])
    (tmp_path / "configuration_baichuan.py").write_text("raise AssertionError('was run')")
    assert load(tmp_path).max_position_embeddings == 4096
    with pytest.raises(UnsupportedModel, match="positions are in ALiBi's distances"):
        load(tmp_path, rope_override=RopeOverride(2.0))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"model.layers.1.self_attn.k_proj.weight": None},
            "model.layers.1.self_attn.k_proj.weight is missing",
        ),
        ({"lm_head.weight": None}, "lm_head.weight is missing"),
        (
            {"model.norm.weight": torch.ones(63)},
            r"model.norm.weight has shape \[63\], but the config asks for \[64\]",
        ),
        (
            {"model.layers.0.mlp.up_proj.weight": torch.ones(112, 65)},
            r"up_proj.weight has shape \[112, 65\], but",
        ),
    ],
)
def test_weights_that_do_not_fit(changes: dict[str, torch.Tensor | None], sentence: str, llama: Path) -> None:
    edit_weights(llama, **changes)
    with pytest.raises(CheckpointError, match=sentence):
        load(llama)


def test_files_that_are_damaged_or_gone(llama: Path) -> None:
    file = llama / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-100], whole[:50], b""):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read as safetensors"):
            load(llama)
    with pytest.raises(ModelError, match="no safetensors files"):
        load(without_weights(llama))


def test_a_missing_file_of_an_index(tmp_path: Path) -> None:
    tiny_models.save("llama", tmp_path, max_shard_size="50KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ModelError, match=gone.name):
        load(tmp_path)


def test_progress_grows_to_all_bytes(llama: Path) -> None:
    reports: list[tuple[int, int]] = []
    load(llama, progress=lambda done, total: reports.append((done, total)))
    tensors = load_file(llama / "model.safetensors")
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert len(reports) > len(tensors)
    assert reports == sorted(reports)
    assert {report[1] for report in reports} == {total}
    assert reports[-1] == (total, total)


def test_what_another_rank_reads_is_no_surplus(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_models.save("gpt2", tmp_path)
    for rank in range(2):
        load(tmp_path, group=Group(rank, 2))
    assert "not used" not in caplog.text


def test_tensors_that_nobody_reads_are_named(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_weights(llama, **{"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})
    load(llama)
    assert "model.layers.0.self_attn.q_proj.bias" in caplog.text
    caplog.clear()
    edit_weights(
        llama,
        **{
            "model.layers.0.self_attn.q_proj.bias": None,
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        },
    )
    load(llama)
    assert not caplog.text


def test_mxfp4_equals_transformers_dequantisation() -> None:
    """Every byte under every exponent that float32 holds as a normal number."""
    exponents = torch.arange(4, 250, dtype=torch.uint8)
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 1, 16).repeat(1, len(exponents), 1)
    scales = exponents.repeat(16, 1)
    theirs = convert_moe_packed_tensors(blocks.unsqueeze(0), scales.unsqueeze(0), dtype=torch.float32)
    assert torch.equal(mxfp4.dequantize(blocks, scales), theirs.squeeze(0).t())


@pytest.mark.parametrize("block", [(8, 16), (32, 5), (1, 1)])
def test_fp8_blocks_that_a_cut_goes_through(block: tuple[int, int], tmp_path: Path) -> None:
    shape, draw = (20, 28), torch.Generator().manual_seed(0)
    grid = [-(-size // of_block) for size, of_block in zip(shape, block, strict=True)]
    stored = torch.randn(shape, generator=draw).to(torch.float8_e4m3fn)
    scales = torch.rand(grid, generator=draw) + 0.5
    save_file({"a.weight": stored, "a.weight_scale_inv": scales}, tmp_path / "model.safetensors")
    whole = stored.float() * torch.kron(scales, torch.ones(block))[: shape[0], : shape[1]]
    with Checkpoint.open(tmp_path) as checkpoint:
        packed = {**block_fp8.find(checkpoint, block)}
        weights = Weights(checkpoint, torch.float32, torch.device("cpu"), packed=packed)
        for rows, columns in (((0, 20), (0, 28)), ((3, 9), (15, 28)), ((19, 20), (0, 1)), ((5, 5), (2, 7))):
            part = weights.read("a.weight", shape, {0: rows, 1: columns})
            assert torch.equal(part, whole[slice(*rows), slice(*columns)])
        assert weights.finish() == []


def test_fp8_without_blocks_is_refused(llama: Path) -> None:
    edit_config(without_weights(llama), quantization_config={"quant_method": "fp8"})
    with pytest.raises(UnsupportedModel, match="fp8 checkpoints without a weight_block_size"):
        load(llama)


@pytest.mark.parametrize("head_dim", [16, 128])
@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.5, "high_freq_factor": 9.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "truncate": False, "beta_fast": 20.0, "beta_slow": 2.0},
        {"rope_type": "yarn", "factor": 0.5},
        {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0},
        {"rope_type": "dynamic", "factor": 4.0},
    ],
    ids=str,
)
def test_frequencies_equal_those_of_transformers(parameters: dict[str, Any], head_dim: int) -> None:
    scaling = {"rope_theta": 500000.0} | parameters
    if parameters["rope_type"] not in ("linear", "dynamic"):
        scaling["original_max_position_embeddings"] = 8192
    config = LlamaConfig(head_dim=head_dim, rope_parameters=scaling, max_position_embeddings=32768)
    theirs, their_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)
    ours, our_factor = inverse_frequencies(read_rope(config, None), head_dim)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)
    assert our_factor == pytest.approx(their_factor, rel=1e-12)
