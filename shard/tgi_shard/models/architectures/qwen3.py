"""Qwen3 (arXiv:2505.09388): Llama's layer with an RMSNorm on every query and key head."""

from dataclasses import replace

from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import (
    MLP,
    Attention,
    DecoderSpec,
    Dims,
    HFConfig,
    Norm,
    layer_windows,
    read_rope,
)
from tgi_shard.weights import names

MODEL_TYPES = ("qwen3",)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    return DecoderSpec(
        dims=Dims.read(config),
        norm=Norm("rms", eps=config.rms_norm_eps),
        attention=Attention(
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            rope=read_rope(config, rope_override),
            qk_norm="per_head",
            windows=layer_windows(config),
        ),
        mlp=MLP(
            intermediate_size=config.intermediate_size,
            activation=config.hidden_act,
            is_gated=True,
            has_bias=False,
        ),
        names=replace(names.LLAMA, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
        has_tied_head=config.tie_word_embeddings,
    )
