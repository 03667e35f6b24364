"""Qwen2 and Qwen2.5 (arXiv:2407.10671): Llama's layer with biases on query, key and value."""

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

MODEL_TYPES = ("qwen2",)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    return DecoderSpec(
        dims=Dims.read(config),
        norm=Norm("rms", eps=config.rms_norm_eps),
        attention=Attention(
            qkv_bias=True,
            out_bias=False,
            rope=read_rope(config, rope_override),
            windows=layer_windows(config),
        ),
        mlp=MLP(
            intermediate_size=config.intermediate_size,
            activation=config.hidden_act,
            is_gated=True,
            has_bias=False,
        ),
        names=names.LLAMA,
        has_tied_head=config.tie_word_embeddings,
    )
