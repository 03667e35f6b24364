"""Gemma 2 (arXiv:2408.00118): Gemma with norms around attention and MLP, soft-caps, alternate windows."""

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
    refuse_two_way,
)
from tgi_shard.weights import names

MODEL_TYPES = ("gemma2",)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    refuse_two_way(config)
    dims = Dims.read(config)
    return DecoderSpec(
        dims=dims,
        norm=Norm("rms", eps=config.rms_norm_eps, is_offset=True),
        norms="around",
        attention=Attention(
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            rope=read_rope(config, rope_override),
            scales=(config.query_pre_attn_scalar**-0.5,) * dims.num_layers,
            windows=layer_windows(config),
            softcap=config.attn_logit_softcapping,
        ),
        mlp=MLP(
            intermediate_size=config.intermediate_size,
            activation=config.hidden_activation,
            is_gated=True,
            has_bias=False,
        ),
        names=replace(
            names.LLAMA,
            post_attention_norm="post_attention_layernorm",
            mlp_norm="pre_feedforward_layernorm",
            post_mlp_norm="post_feedforward_layernorm",
        ),
        has_tied_head=config.tie_word_embeddings,
        embedding_scale=dims.hidden_size**0.5,
        logit_softcap=config.final_logit_softcapping,
    )
