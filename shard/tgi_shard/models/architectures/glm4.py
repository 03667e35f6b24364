"""GLM-4-0414 (Z.ai 2025): GLM-4 with norms around attention and MLP."""

from dataclasses import replace

from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import MLP, Attention, DecoderSpec, Dims, HFConfig, Norm, read_rope
from tgi_shard.weights import names

MODEL_TYPES = ("glm4",)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    return DecoderSpec(
        dims=Dims.read(config),
        norm=Norm("rms", eps=config.rms_norm_eps),
        norms="around",
        attention=Attention(
            qkv_bias=config.attention_bias,
            out_bias=False,
            rope=read_rope(config, rope_override, is_partial=True, is_interleaved=True),
        ),
        mlp=MLP(
            intermediate_size=config.intermediate_size,
            activation=config.hidden_act,
            is_gated=True,
            has_bias=False,
        ),
        names=replace(
            names.LLAMA,
            post_attention_norm="post_self_attn_layernorm",
            mlp_in=("mlp.gate_up_proj",),
            post_mlp_norm="post_mlp_layernorm",
        ),
        has_tied_head=config.tie_word_embeddings,
    )
