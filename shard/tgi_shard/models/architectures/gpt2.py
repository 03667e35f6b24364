"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, biases, a plain MLP, weights as [in, out]."""

from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import (
    MLP,
    Attention,
    DecoderSpec,
    Dims,
    HFConfig,
    Norm,
    UnsupportedModel,
    refuse_rope_override,
)
from tgi_shard.weights import names

MODEL_TYPES = ("gpt2",)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    if config.add_cross_attention:
        raise UnsupportedModel(
            "gpt2 models with cross-attention layers (add_cross_attention) are not supported"
        )
    refuse_rope_override(config, rope_override, "learned")
    dims = Dims.read(config)
    scale = dims.head_dim**-0.5 if config.scale_attn_weights else 1.0
    by_layer = config.scale_attn_by_inverse_layer_idx
    return DecoderSpec(
        dims=dims,
        norm=Norm("layer", eps=config.layer_norm_epsilon, has_bias=True),
        attention=Attention(
            qkv_bias=True,
            out_bias=True,
            rope=None,
            scales=tuple(scale / (layer + 1 if by_layer else 1) for layer in range(dims.num_layers)),
        ),
        mlp=MLP(
            intermediate_size=config.n_inner or 4 * dims.hidden_size,
            activation=config.activation_function,
            is_gated=False,
            has_bias=True,
        ),
        names=names.GPT2,
        has_tied_head=config.tie_word_embeddings,
        weight_layout="in_out",
    )
