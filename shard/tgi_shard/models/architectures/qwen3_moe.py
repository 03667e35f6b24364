"""Qwen 3 MoE (arXiv:2505.09388): Qwen 3's layer with many small experts."""

from dataclasses import replace

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
    read_rope,
    sparse_layers,
)
from tgi_shard.weights import names

MODEL_TYPES = ("qwen3_moe",)

EXPERTS = names.Experts(
    router="mlp.gate",
    mlp_in=("mlp.experts.{expert}.gate_proj", "mlp.experts.{expert}.up_proj"),
    mlp_out="mlp.experts.{expert}.down_proj",
)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    dims = Dims.read(config)
    return DecoderSpec(
        dims=dims,
        norm=Norm("rms", eps=config.rms_norm_eps),
        attention=Attention(
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            rope=read_rope(config, rope_override),
            qk_norm="per_head",
            windows=None if config.sliding_window is None else (config.sliding_window,) * dims.num_layers,
        ),
        mlp=MLP(config.intermediate_size, config.hidden_act, is_gated=True, has_bias=False),
        moe=MoE(
            num_experts=config.num_experts,
            intermediate_size=config.moe_intermediate_size,
            activation=config.hidden_act,
            routing=SoftmaxTopK(config.num_experts_per_tok, is_renormalised=config.norm_topk_prob),
            layers=sparse_layers(config),
        ),
        names=replace(
            names.LLAMA, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm", experts=EXPERTS
        ),
        has_tied_head=config.tie_word_embeddings,
    )
