"""StarCoder and SantaCoder (arXiv:2305.06161): GPT-2's layer, all query heads on one key and one value."""

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

MODEL_TYPES = ("gpt_bigcode",)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    refuse_rope_override(config, rope_override, "learned")
    if config.add_cross_attention:
        raise UnsupportedModel(
            "gpt_bigcode models with cross-attention layers (add_cross_attention) are not supported"
        )
    hidden_size, num_heads = config.hidden_size, config.num_attention_heads
    dims = Dims(
        vocab_size=config.vocab_size,
        hidden_size=hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=1 if config.multi_query else num_heads,
        head_dim=hidden_size // num_heads,
        max_positions=config.max_position_embeddings,
    )
    return DecoderSpec(
        dims=dims,
        norm=Norm("layer", eps=config.layer_norm_epsilon, has_bias=True),
        attention=Attention(
            qkv_bias=True,
            out_bias=True,
            rope=None,
            scales=None if config.scale_attn_weights else (1.0,) * dims.num_layers,
            qkv_layout="groups",
        ),
        mlp=MLP(
            intermediate_size=config.n_inner or 4 * hidden_size,
            activation=config.activation_function,
            is_gated=False,
            has_bias=True,
        ),
        names=names.GPT2,
        has_tied_head=config.tie_word_embeddings,
    )
