"""Falcon 7B, 40B, 180B, 11B (arXiv:2311.16867) and RW: one KV head or a few, one norm or two, or ALiBi."""

from dataclasses import replace

from tgi_shard.models import alibi
from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import (
    MLP,
    Attention,
    DecoderSpec,
    Dims,
    HFConfig,
    Norm,
    read_rope,
    refuse_rope_override,
)
from tgi_shard.weights.names import Names

MODEL_TYPES = ("falcon",)

NAMES = Names(
    prefix="transformer.",
    embedding="word_embeddings",
    head="lm_head",
    final_norm="ln_f",
    layer="h.{layer}.",
    attention_norm="input_layernorm",
    qkv=("self_attention.query_key_value",),
    attention_out="self_attention.dense",
    mlp_norm="post_attention_layernorm",
    mlp_in=("mlp.dense_h_to_4h",),
    mlp_out="mlp.dense_4h_to_h",
)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    is_new, num_heads = config.new_decoder_architecture, config.num_attention_heads
    num_kv_heads = config.num_kv_heads if is_new else 1 if config.multi_query else num_heads
    dims = replace(Dims.read(config), num_kv_heads=num_kv_heads)
    if config.alibi:
        refuse_rope_override(config, rope_override, "in ALiBi's distances")
    # The scale of scores also divides what distance takes off them.
    slopes = tuple(slope * dims.head_dim**-0.5 for slope in alibi.powers_of_two(num_heads))
    has_two_norms = config.parallel_attn and is_new and config.num_ln_in_parallel_attn in (None, 2)
    return DecoderSpec(
        dims=dims,
        norm=Norm("layer", eps=config.layer_norm_epsilon, has_bias=True),
        residual=(
            "parallel" if has_two_norms else "parallel_one_norm" if config.parallel_attn else "sequential"
        ),
        attention=Attention(
            qkv_bias=config.bias,
            out_bias=config.bias,
            rope=None if config.alibi else read_rope(config, rope_override),
            alibi=slopes if config.alibi else None,
            qkv_layout="groups",
        ),
        mlp=MLP(
            intermediate_size=config.ffn_hidden_size,
            activation=config.activation,
            is_gated=False,
            has_bias=config.bias,
        ),
        names=replace(NAMES, attention_norm="ln_attn", mlp_norm="ln_mlp") if has_two_norms else NAMES,
        has_tied_head=config.tie_word_embeddings,
    )
