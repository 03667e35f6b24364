"""Granite 3 (IBM 2024): Llama's layer with multipliers on embeddings, scores, residuals and logits."""

from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import MLP, Attention, DecoderSpec, Dims, HFConfig, Norm, read_rope
from tgi_shard.weights import names

MODEL_TYPES = ("granite",)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    dims = Dims.read(config)
    return DecoderSpec(
        dims=dims,
        norm=Norm("rms", eps=config.rms_norm_eps),
        residual_scale=config.residual_multiplier,
        attention=Attention(
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            rope=read_rope(config, rope_override),
            scales=(config.attention_multiplier,) * dims.num_layers,
        ),
        mlp=MLP(
            intermediate_size=config.intermediate_size,
            activation=config.hidden_act,
            is_gated=True,
            has_bias=config.mlp_bias,
        ),
        names=names.LLAMA,
        has_tied_head=config.tie_word_embeddings,
        embedding_scale=config.embedding_multiplier,
        logit_scale=1 / config.logits_scaling,
    )
