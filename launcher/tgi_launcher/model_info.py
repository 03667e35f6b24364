"""What the plan needs to know of a model: the facts in its config.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

from tgi_demo import MODEL_PATH


class NoConfig(Exception):
    """config.json cannot be had or read; the message says why."""


@dataclass(frozen=True, slots=True)
class Latents:
    """DeepSeek's attention by way of narrow vectors (arXiv:2405.04434): the cache holds one a token."""

    query_rank: int | None  # None: queries come from the hidden states
    kv_rank: int
    plain_dim: int  # of a head's keys, those that do not turn
    rope_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """None: config.json does not say."""

    model_type: str | None = None
    max_position_embeddings: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    expert_size: int | None = None  # the same of an expert, where that differs
    latents: Latents | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    num_layers: int | None = None
    head_dim: int | None = None
    vocab_size: int | None = None
    quant_method: str | None = None
    is_vision: bool = False
    num_experts_per_token: int = 1
    num_shared_experts: int = 0
    num_experts: int = 1
    num_routed_experts: int = 0  # of DeepSeek and Qwen, which name them otherwise


def local_folder(model_id: str) -> Path | None:
    """The folder that holds the model already; None if `model_id` must be looked up on the hub."""
    if model_id == "demo":
        return MODEL_PATH
    return Path(model_id) if Path(model_id).exists() else None


def probe(
    model_id: str, revision: str | None, environ: Mapping[str, str], hub_cache: str | None
) -> ModelInfo:
    """Raises NoConfig."""
    folder = local_folder(model_id)
    try:
        path = folder / "config.json" if folder else _fetch(model_id, revision, environ, hub_cache)
        return read(json.loads(path.read_text(encoding="utf-8")))
    except (
        HfHubHTTPError,
        OSError,
        ValueError,
    ) as error:  # no network is an OSError, no such name a ValueError
        raise NoConfig(str(error)) from error


def _fetch(model_id: str, revision: str | None, environ: Mapping[str, str], hub_cache: str | None) -> Path:
    """From the cache if it is there: what the plan reads does not change, and a machine may be offline."""
    cached = try_to_load_from_cache(model_id, "config.json", cache_dir=hub_cache, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    token = environ.get("HF_API_TOKEN") or environ.get("HF_TOKEN")  # None: the one in the token file, if any
    return Path(hf_hub_download(model_id, "config.json", revision=revision, cache_dir=hub_cache, token=token))


def read(config: Any) -> ModelInfo:
    """Raises NoConfig where a field holds something of another type than it must."""
    if not isinstance(config, dict):
        raise NoConfig(f"config.json holds no object but {type(config).__name__}")
    is_vision = "vision_config" in config
    whole_type, text = _text(config, "model_type"), config.get("text_config")
    if isinstance(text, dict):
        config = config | text
    hidden_size = _whole(config, "hidden_size", "n_embd")
    num_heads = _whole(config, "num_attention_heads", "n_head")
    return ModelInfo(
        model_type=whole_type,
        # An encoder-decoder's n_positions limits no step: T5 has relative positions.
        max_position_embeddings=None
        if config.get("is_encoder_decoder")
        else _whole(config, "max_position_embeddings", "max_seq_len", "n_positions"),
        hidden_size=hidden_size,
        intermediate_size=_whole(config, "intermediate_size"),
        expert_size=_whole(config, "moe_intermediate_size"),
        latents=_latents(config),
        num_heads=num_heads,
        num_kv_heads=_whole(config, "num_key_value_heads") or num_heads,
        num_layers=_whole(config, "num_hidden_layers", "n_layer"),
        head_dim=_head_dim(config, whole_type, hidden_size, num_heads),
        vocab_size=_whole(config, "vocab_size"),
        quant_method=_text(config.get("quantization_config") or {}, "quant_method"),
        is_vision=is_vision,
        num_experts_per_token=_whole(config, "num_experts_per_tok") or 1,
        num_shared_experts=_whole(config, "n_shared_experts") or 0,
        num_experts=_whole(config, "num_local_experts") or 1,
        num_routed_experts=_whole(config, "n_routed_experts", "num_experts") or 0,
    )


def _latents(config: dict[str, Any]) -> Latents | None:
    fields = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    sizes = [size for size in (_whole(config, field) for field in fields) if size is not None]
    return Latents(_whole(config, "q_lora_rank"), *sizes) if len(sizes) == len(fields) else None


def _head_dim(
    config: dict[str, Any], model_type: str | None, hidden_size: int | None, num_heads: int | None
) -> int | None:
    if head_dim := _whole(config, "head_dim"):
        return head_dim
    if model_type == "gemma3":
        return 256
    if hidden_size and num_heads and hidden_size % num_heads == 0:
        return hidden_size // num_heads
    return None


def _whole(config: Any, *names: str) -> int | None:
    """The first of `names` that is there."""
    for name in names:
        value = _field(config, name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int):
                raise NoConfig(f"config.json: {name} must be a whole number, not {value!r}")
            return value
    return None


def _text(config: Any, name: str) -> str | None:
    value = _field(config, name)
    if value is not None and not isinstance(value, str):
        raise NoConfig(f"config.json: {name} must be a string, not {value!r}")
    return value


def _field(config: Any, name: str) -> Any:
    if not isinstance(config, dict):
        raise NoConfig(f"config.json: an object was expected around {name}, not {config!r}")
    return config.get(name)
