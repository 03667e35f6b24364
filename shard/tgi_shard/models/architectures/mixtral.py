"""Mixtral (arXiv:2401.04088): Mistral's layer with a mixture of experts in place of the MLP."""

from dataclasses import replace

from tgi_shard.layers.moe import SoftmaxTopK
from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import MLP, Attention, DecoderSpec, Dims, HFConfig, MoE, Norm, read_rope
from tgi_shard.weights import names

MODEL_TYPES = ("mixtral",)

EXPERTS = names.Experts(
    router="block_sparse_moe.gate",
    mlp_in=("block_sparse_moe.experts.{expert}.w1", "block_sparse_moe.experts.{expert}.w3"),
    mlp_out="block_sparse_moe.experts.{expert}.w2",
)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    dims = Dims.read(config)
    return DecoderSpec(
        dims=dims,
        norm=Norm("rms", eps=config.rms_norm_eps),
        attention=Attention(
            qkv_bias=False,
            out_bias=False,
            rope=read_rope(config, rope_override),
            windows=None if config.sliding_window is None else (config.sliding_window,) * dims.num_layers,
        ),
        mlp=MLP(config.intermediate_size, config.hidden_act, is_gated=True, has_bias=False),
        moe=MoE(
            num_experts=config.num_local_experts,
            intermediate_size=config.intermediate_size,
            activation=config.hidden_act,
            routing=SoftmaxTopK(config.num_experts_per_tok, is_renormalised=True),
            layers=(True,) * dims.num_layers,
        ),
        names=replace(names.LLAMA, experts=EXPERTS),
        has_tied_head=config.tie_word_embeddings,
    )
