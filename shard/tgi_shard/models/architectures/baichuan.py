"""Baichuan 1 and 2 (arXiv:2309.10305): Llama's layer with fused QKV; 7B rotates, 13B has ALiBi.

transformers ships no such model. The config class below takes the place of the code in the repositories on
the Hub, which is never run.
"""

from dataclasses import replace
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from tgi_shard.models import alibi
from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import (
    MLP,
    Attention,
    DecoderSpec,
    Dims,
    HFConfig,
    Norm,
    read_rope,
    refuse_rope_override,
)
from tgi_shard.weights import names

MODEL_TYPES = ("baichuan",)
VOCAB_SIZE_OF_BAICHUAN_2 = 125696


class BaichuanConfig(PreTrainedConfig):
    """Only the models with rotary positions have max_position_embeddings; the others, model_max_length."""

    model_type = "baichuan"

    vocab_size: int = 64000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_act: str = "silu"
    max_position_embeddings: int | None = None
    model_max_length: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    z_loss_weight: float | None = None  # every Baichuan 2 has it, no Baichuan 1
    rope_parameters: dict[str, Any] | None = None
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2


AutoConfig.register(BaichuanConfig.model_type, BaichuanConfig, exist_ok=True)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    has_alibi = config.max_position_embeddings is None
    if has_alibi:
        refuse_rope_override(config, rope_override, "in ALiBi's distances")
    num_heads = config.num_attention_heads
    return DecoderSpec(
        dims=Dims(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=config.hidden_size // num_heads,
            max_positions=config.model_max_length if has_alibi else config.max_position_embeddings,
        ),
        norm=Norm("rms", eps=config.rms_norm_eps),
        attention=Attention(
            qkv_bias=False,
            out_bias=False,
            rope=None if has_alibi else read_rope(config, rope_override),
            alibi=alibi.powers_of_two(num_heads) if has_alibi else None,
        ),
        mlp=MLP(config.intermediate_size, config.hidden_act, is_gated=True, has_bias=False),
        names=replace(names.LLAMA, qkv=("self_attn.W_pack",)),
        has_tied_head=config.tie_word_embeddings,
        has_unit_head=config.z_loss_weight is not None or config.vocab_size == VOCAB_SIZE_OF_BAICHUAN_2,
    )
