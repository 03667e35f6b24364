"""Command R and Aya (Cohere 2024): parallel after one bias-less LayerNorm, interleaved rotary."""

from dataclasses import replace

from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import MLP, Attention, DecoderSpec, Dims, HFConfig, Norm, read_rope
from tgi_shard.weights import names

MODEL_TYPES = ("cohere",)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    return DecoderSpec(
        dims=Dims.read(config),
        norm=Norm("layer", eps=config.layer_norm_eps),
        residual="parallel_one_norm",
        attention=Attention(
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            rope=read_rope(config, rope_override, is_interleaved=True),
            qk_norm="each_head" if config.use_qk_norm else None,
        ),
        mlp=MLP(
            intermediate_size=config.intermediate_size,
            activation=config.hidden_act,
            is_gated=True,
            has_bias=False,
        ),
        names=replace(names.LLAMA, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
        has_tied_head=config.tie_word_embeddings,
        logit_scale=config.logit_scale,
    )
