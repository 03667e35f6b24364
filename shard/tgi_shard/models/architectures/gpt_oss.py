"""gpt-oss (arXiv:2508.10925): attention sinks, alternate windows, stacked experts with clamped gates.

The experts' weights are stored in MXFP4, as OpenAI published them, or like all others.
"""

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
)
from tgi_shard.weights import names

MODEL_TYPES = ("gpt_oss",)
QUANTIZATIONS = ("mxfp4",)

EXPERTS = names.Experts(
    router="mlp.router",
    mlp_in=("mlp.experts.{expert}.gate_up",),
    mlp_out="mlp.experts.{expert}.down",
    stacked=(
        ("mlp.experts.{expert}.gate_up.weight", "mlp.experts.gate_up_proj"),
        ("mlp.experts.{expert}.gate_up.bias", "mlp.experts.gate_up_proj_bias"),
        ("mlp.experts.{expert}.down.weight", "mlp.experts.down_proj"),
        ("mlp.experts.{expert}.down.bias", "mlp.experts.down_proj_bias"),
    ),
)

EXPERTS_MXFP4 = replace(
    EXPERTS,
    is_mxfp4=True,
    stacked=(
        ("mlp.experts.{expert}.gate_up.blocks", "mlp.experts.gate_up_proj_blocks"),
        ("mlp.experts.{expert}.gate_up.scales", "mlp.experts.gate_up_proj_scales"),
        ("mlp.experts.{expert}.gate_up.bias", "mlp.experts.gate_up_proj_bias"),
        ("mlp.experts.{expert}.down.blocks", "mlp.experts.down_proj_blocks"),
        ("mlp.experts.{expert}.down.scales", "mlp.experts.down_proj_scales"),
        ("mlp.experts.{expert}.down.bias", "mlp.experts.down_proj_bias"),
    ),
)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    dims = Dims.read(config)
    is_mxfp4 = getattr(config, "quantization_config", None) is not None
    return DecoderSpec(
        dims=dims,
        norm=Norm("rms", eps=config.rms_norm_eps),
        attention=Attention(
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            rope=read_rope(config, rope_override),
            windows=layer_windows(config),
            has_sinks=True,
        ),
        mlp=MLP(config.intermediate_size, config.hidden_act, is_gated=True, has_bias=True),
        moe=MoE(
            num_experts=config.num_local_experts,
            intermediate_size=config.intermediate_size,
            activation=config.hidden_act,
            # The softmax of the chosen scores alone: the same numbers.
            routing=SoftmaxTopK(config.num_experts_per_tok, is_renormalised=True),
            layers=(True,) * dims.num_layers,
            has_bias=True,
            clamped_gate=(config.swiglu_alpha, config.swiglu_limit),
            in_layout="out_in" if is_mxfp4 else "in_out",
            out_layout="out_in" if is_mxfp4 else "in_out",
        ),
        names=replace(names.LLAMA, sinks="self_attn.sinks", experts=EXPERTS_MXFP4 if is_mxfp4 else EXPERTS),
        has_tied_head=config.tie_word_embeddings,
    )
