"""MPT (MosaicML 2023): ALiBi, no biases anywhere, perhaps clamped projections."""

from tgi_shard.models import alibi
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
from tgi_shard.weights.names import Names

MODEL_TYPES = ("mpt",)

NAMES = Names(
    prefix="transformer.",
    embedding="wte",
    head="lm_head",
    final_norm="norm_f",
    layer="blocks.{layer}.",
    attention_norm="norm_1",
    qkv=("attn.Wqkv",),
    attention_out="attn.out_proj",
    mlp_norm="norm_2",
    mlp_in=("ffn.up_proj",),
    mlp_out="ffn.down_proj",
)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    refuse_rope_override(config, rope_override, "in ALiBi's distances")
    attention = config.attn_config
    for what, is_there in (
        ("without ALiBi (attn_config.alibi)", not attention.alibi),
        ("with norms of queries and keys (attn_config.qk_ln)", attention.qk_ln),
        ("that scale their logits (logit_scale)", config.logit_scale is not None),
    ):
        if is_there:
            raise UnsupportedModel(f"mpt models {what} are not supported")
    dims = Dims(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        num_layers=config.n_layers,
        num_heads=config.n_heads,
        num_kv_heads=config.n_heads,
        head_dim=config.d_model // config.n_heads,
        max_positions=config.max_seq_len,
    )
    scale = attention.softmax_scale
    return DecoderSpec(
        dims=dims,
        norm=Norm("layer", eps=config.layer_norm_epsilon),
        attention=Attention(
            qkv_bias=False,
            out_bias=False,
            rope=None,
            scales=None if scale is None else (scale,) * dims.num_layers,
            alibi=alibi.cut_series(dims.num_heads, attention.alibi_bias_max),
            clip_qkv=attention.clip_qkv or None,
        ),
        mlp=MLP(
            intermediate_size=config.expansion_ratio * dims.hidden_size,
            activation="gelu",
            is_gated=False,
            has_bias=False,
        ),
        names=NAMES,
        has_tied_head=config.tie_word_embeddings,
    )
