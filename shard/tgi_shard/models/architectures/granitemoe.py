"""Granite 3 MoE (IBM 2024): Granite with a mixture of experts, whose weights the checkpoint stacks."""

from dataclasses import replace

from tgi_shard.layers.moe import SoftmaxTopK
from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import MLP, Attention, DecoderSpec, Dims, HFConfig, MoE, Norm, read_rope
from tgi_shard.weights import names

MODEL_TYPES = ("granitemoe",)

EXPERTS = names.Experts(
    router="block_sparse_moe.router.layer",
    mlp_in=("block_sparse_moe.{expert}.input",),
    mlp_out="block_sparse_moe.{expert}.output",
    stacked=(
        ("block_sparse_moe.{expert}.input.weight", "block_sparse_moe.input_linear.weight"),
        ("block_sparse_moe.{expert}.output.weight", "block_sparse_moe.output_linear.weight"),
    ),
)


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
        embedding_scale=config.embedding_multiplier,
        logit_scale=1 / config.logits_scaling,
    )
