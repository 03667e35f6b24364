"""How many tokens a step may process when nobody said: from the model's size and the GPU's speed and memory.

The formulas are those of launcher.md, section 4.6, and in their sense for what TGI leaves out: attention by
way of latents, and experts of a size of their own.
"""

import math

from tgi_launcher.devices import Devices
from tgi_launcher.model_info import Latents, ModelInfo

CPU_TOKENS = 512  # a step must not stall the running streams for seconds
FALLBACK_TOKENS = 4096
FALLBACK_TOKENS_OF = {"qwen2_vl": 10000, "qwen2_5_vl": 10000, "gemma3": 8000}

# Dense float16 TFLOP/s, by the name that nvidia-smi gives the card.
TFLOPS = {
    "nvidia-4090": 82,
    "nvidia-t4": 65,
    "nvidia-l4": 121,
    "nvidia-l40": 181,
    "nvidia-l40s": 363,
    "nvidia-a10g": 125,
    "nvidia-a40": 149,
    "nvidia-a100": 312,
    "nvidia-a100-sxm4-80gb": 312,
    "nvidia-a100-sxm4-40gb": 312,
    "nvidia-a100-80gb-pcie": 312,
    "nvidia-h100": 900,
    "nvidia-h100-80gb-hbm3": 900,
    "nvidia-h100-nvl": 900,
    "nvidia-h200": 989,
}


def on_cpu(model: ModelInfo, num_running: int) -> int:
    """`num_running`: the most sequences that run at a time; each has its token in every step."""
    value = min(CPU_TOKENS, model.max_position_embeddings or CPU_TOKENS)
    return max(value, min(num_running, FALLBACK_TOKENS))


def on_gpu(
    model: ModelInfo, devices: Devices, num_shard: int, memory_fraction: float, wiggle_room: float
) -> tuple[int, list[str]]:
    """The budget, and what to warn of."""
    warnings: list[str] = []
    optimal = _optimal(model, devices, num_shard, warnings)
    fallback = FALLBACK_TOKENS_OF.get(model.model_type or "", FALLBACK_TOKENS)
    default = optimal if optimal is not None and optimal > 100 else fallback
    if model.max_position_embeddings is not None:
        default = min(default, model.max_position_embeddings)
    fitting = _fitting(model, devices, num_shard, memory_fraction * wiggle_room, warnings)
    if fitting is None or fitting >= default:
        return default, warnings
    warnings.append(
        f"Reducing the max batch prefill from {default} to {fitting} because there is not enough VRAM "
        "to support it."
    )
    return max(1, fitting), warnings


def _optimal(model: ModelInfo, devices: Devices, num_shard: int, warnings: list[str]) -> int | None:
    """Tokens that keep the GPUs busy for a second; None if the card or the model's sizes are unknown."""
    tflops = TFLOPS.get(devices.card or "")
    if tflops is None:
        warnings.append(f"Unkown compute for card {devices.card}")
        return None
    if (
        model.is_vision
        or model.num_heads is None
        or model.num_kv_heads is None
        or model.num_layers is None
        or model.head_dim is None
        or model.hidden_size is None
        or model.intermediate_size is None
    ):
        return None
    attention = 2 * model.head_dim * model.hidden_size * (3 * model.num_heads + 2 * model.num_kv_heads)
    if model.latents is not None:
        attention = 2 * _latent_weights(model.latents, model.hidden_size, model.num_heads)
    mlp_width = (model.expert_size or model.intermediate_size) * (
        model.num_experts_per_token + model.num_shared_experts
    )
    flops_per_token = model.num_layers * (attention + 6 * model.hidden_size * mlp_width)
    return math.floor(tflops * 1e12 * num_shard / flops_per_token)


def _fitting(
    model: ModelInfo, devices: Devices, num_shard: int, memory_fraction: float, warnings: list[str]
) -> int | None:
    """Tokens whose activations and KV fit beside the weights; None if a size is unknown or nothing fits."""
    if (
        devices.memory_bytes is None
        or model.quant_method is not None
        or model.num_heads is None
        or model.num_kv_heads is None
        or model.num_layers is None
        or model.head_dim is None
        or model.hidden_size is None
        or model.intermediate_size is None
        or model.vocab_size is None
    ):
        return None
    available = math.floor(devices.memory_bytes * num_shard * memory_fraction)
    # TGI forgets to multiply the QKV projection by the hidden size, which promises memory that is not there.
    num_experts = max(model.num_experts, model.num_routed_experts + model.num_shared_experts)
    mlp = 3 * (model.expert_size or model.intermediate_size) * num_experts * model.hidden_size
    attention = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim * model.hidden_size
    key_values = 4 * model.num_kv_heads * model.head_dim * model.num_layers
    if model.latents is not None:
        attention = _latent_weights(model.latents, model.hidden_size, model.num_heads)
        key_values = 2 * (model.latents.kv_rank + model.latents.rope_dim) * model.num_layers
    weights = 2 * (model.num_layers * (mlp + attention) + 2 * model.hidden_size * model.vocab_size)
    if weights > available:
        warnings.append(
            f"Not enough VRAM to run the model: Available: {_gigabytes(available)} - "
            f"Model {_gigabytes(weights)}."
        )
        return None
    activations = 6 * model.num_experts * (model.intermediate_size + model.intermediate_size // 2)
    return (available - weights) // (key_values + activations)


def _latent_weights(latents: Latents, hidden_size: int, num_heads: int) -> int:
    """Of a layer's attention; each is multiplied by once a token."""
    query_dim = num_heads * (latents.plain_dim + latents.rope_dim)
    queries = hidden_size * query_dim
    if latents.query_rank is not None:
        queries = latents.query_rank * (hidden_size + query_dim)
    down = hidden_size * (latents.kv_rank + latents.rope_dim)
    up = latents.kv_rank * num_heads * (latents.plain_dim + latents.value_dim)
    return queries + down + up + num_heads * latents.value_dim * hidden_size


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f}GB"
