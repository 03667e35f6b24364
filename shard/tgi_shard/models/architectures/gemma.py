"""Gemma (arXiv:2403.08295): norm weights stored minus 1, embeddings times sqrt(hidden), wide heads."""

from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import MLP, Attention, DecoderSpec, Dims, HFConfig, Norm, read_rope, refuse_two_way
from tgi_shard.weights import names

MODEL_TYPES = ("gemma",)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    refuse_two_way(config)
    dims = Dims.read(config)
    return DecoderSpec(
        dims=dims,
        norm=Norm("rms", eps=config.rms_norm_eps, is_offset=True),
        attention=Attention(
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            rope=read_rope(config, rope_override),
        ),
        mlp=MLP(
            intermediate_size=config.intermediate_size,
            activation=config.hidden_act,
            is_gated=True,
            has_bias=False,
        ),
        names=names.LLAMA,
        has_tied_head=config.tie_word_embeddings,
        embedding_scale=dims.hidden_size**0.5,
    )
