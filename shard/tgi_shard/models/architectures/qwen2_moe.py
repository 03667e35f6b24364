"""Qwen 1.5 MoE and Qwen 2 MoE (arXiv:2407.10671): many small experts and one that sees every token."""

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
    layer_windows,
    read_rope,
    sparse_layers,
)
from tgi_shard.weights import names

MODEL_TYPES = ("qwen2_moe",)

EXPERTS = names.Experts(
    router="mlp.gate",
    mlp_in=("mlp.experts.{expert}.gate_proj", "mlp.experts.{expert}.up_proj"),
    mlp_out="mlp.experts.{expert}.down_proj",
    shared_in=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    shared_out="mlp.shared_expert.down_proj",
    shared_gate="mlp.shared_expert_gate",
)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    return DecoderSpec(
        dims=Dims.read(config),
        norm=Norm("rms", eps=config.rms_norm_eps),
        attention=Attention(
            qkv_bias=config.qkv_bias,
            out_bias=False,
            rope=read_rope(config, rope_override),
            windows=layer_windows(config),
        ),
        mlp=MLP(config.intermediate_size, config.hidden_act, is_gated=True, has_bias=False),
        moe=MoE(
            num_experts=config.num_experts,
            intermediate_size=config.moe_intermediate_size,
            activation=config.hidden_act,
            routing=SoftmaxTopK(config.num_experts_per_tok, is_renormalised=config.norm_topk_prob),
            layers=sparse_layers(config),
            shared_size=config.shared_expert_intermediate_size,
            shared_gate=True,
        ),
        names=replace(names.LLAMA, experts=EXPERTS),
        has_tied_head=config.tie_word_embeddings,
    )
