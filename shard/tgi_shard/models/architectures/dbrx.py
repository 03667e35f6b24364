"""DBRX (Databricks 2024): fine-grained experts, stacked in the checkpoint, and clamped projections."""

from tgi_shard.layers.moe import SoftmaxTopK
from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import (
    MLP,
    Attention,
    DecoderSpec,
    Dims,
    HFConfig,
    MoE,
    Norm,
    UnsupportedModel,
    read_rope,
)
from tgi_shard.weights.names import Experts, Names

MODEL_TYPES = ("dbrx",)

NAMES = Names(
    prefix="transformer.",
    embedding="wte",
    head="lm_head",
    final_norm="norm_f",
    layer="blocks.{layer}.",
    attention_norm="norm_attn_norm.norm_1",
    qkv=("norm_attn_norm.attn.Wqkv",),
    attention_out="norm_attn_norm.attn.out_proj",
    mlp_norm="norm_attn_norm.norm_2",
    mlp_in=(),
    mlp_out="",
    experts=Experts(
        router="ffn.router.layer",
        mlp_in=("ffn.experts.{expert}.w1", "ffn.experts.{expert}.v1"),
        mlp_out="ffn.experts.{expert}.w2",
        stacked=(
            ("ffn.experts.{expert}.w1.weight", "ffn.experts.mlp.w1"),
            ("ffn.experts.{expert}.v1.weight", "ffn.experts.mlp.v1"),
            ("ffn.experts.{expert}.w2.weight", "ffn.experts.mlp.w2"),
        ),
    ),
)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    attention, ffn = config.attn_config, config.ffn_config
    power = ffn.moe_normalize_expert_weights
    if power not in (None, 1):
        raise UnsupportedModel(
            f"dbrx models whose experts' weights have unit {power}-norm (moe_normalize_expert_weights) are "
            f"not supported, only 1"
        )
    dims = Dims(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        num_layers=config.n_layers,
        num_heads=config.n_heads,
        num_kv_heads=attention.kv_n_heads,
        head_dim=config.d_model // config.n_heads,
        max_positions=config.max_seq_len,
    )
    activation = ffn.ffn_act_fn.get("name", "silu")
    return DecoderSpec(
        dims=dims,
        norm=Norm("layer", eps=1e-5),
        attention=Attention(
            qkv_bias=False,
            out_bias=False,
            rope=read_rope(config, rope_override),
            clip_qkv=attention.clip_qkv,
        ),
        mlp=MLP(ffn.ffn_hidden_size, activation, is_gated=True, has_bias=False),
        moe=MoE(
            num_experts=ffn.moe_num_experts,
            intermediate_size=ffn.ffn_hidden_size,
            activation=activation,
            routing=SoftmaxTopK(ffn.moe_top_k, is_renormalised=power is not None),
            layers=(True,) * dims.num_layers,
            out_layout="in_out",
        ),
        names=NAMES,
        has_tied_head=config.tie_word_embeddings,
    )
