"""Phi 3.5 MoE (arXiv:2404.14219): LayerNorms, longrope, two experts a token chosen by SparseMixer."""

from dataclasses import replace

from tgi_shard.layers.moe import SparseMixer
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
from tgi_shard.weights import names

MODEL_TYPES = ("phimoe",)

EXPERTS = names.Experts(
    router="block_sparse_moe.gate",
    mlp_in=("block_sparse_moe.experts.{expert}.w1", "block_sparse_moe.experts.{expert}.w3"),
    mlp_out="block_sparse_moe.experts.{expert}.w2",
)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    if config.num_experts_per_tok != 2:
        raise UnsupportedModel(
            f"phimoe models that choose {config.num_experts_per_tok} experts a token are not supported"
        )
    dims = Dims.read(config)
    return DecoderSpec(
        dims=dims,
        norm=Norm("layer", eps=config.rms_norm_eps, has_bias=True),
        attention=Attention(
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            rope=read_rope(config, rope_override),
            windows=None if config.sliding_window is None else (config.sliding_window,) * dims.num_layers,
        ),
        mlp=MLP(config.intermediate_size, config.hidden_act, is_gated=True, has_bias=False),
        moe=MoE(
            num_experts=config.num_local_experts,
            intermediate_size=config.intermediate_size,
            activation=config.hidden_act,
            routing=SparseMixer(config.router_jitter_noise),
            layers=(True,) * dims.num_layers,
        ),
        names=replace(names.LLAMA, experts=EXPERTS),
        has_tied_head=config.tie_word_embeddings,
        head_bias=config.lm_head_bias,
    )
