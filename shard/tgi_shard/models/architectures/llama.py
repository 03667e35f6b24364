"""Llama 1 to 3 and all who share its layer (arXiv:2302.13971, arXiv:2407.21783)."""

from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import MLP, Attention, DecoderSpec, Dims, HFConfig, Norm, read_rope
from tgi_shard.weights import names

MODEL_TYPES = ("llama",)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    return DecoderSpec(
        dims=Dims.read(config),
        norm=Norm("rms", eps=config.rms_norm_eps),
        attention=Attention(
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            rope=read_rope(config, rope_override),
        ),
        mlp=MLP(
            intermediate_size=config.intermediate_size,
            activation=config.hidden_act,
            is_gated=True,
            has_bias=config.mlp_bias,
        ),
        names=names.LLAMA,
        has_tied_head=config.tie_word_embeddings,
    )
