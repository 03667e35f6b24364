"""Llama 4's text model (Meta 2025): rotary layers that see a chunk, others that see all; one expert of many.

The layers that do not rotate scale their queries with the position (arXiv:2501.19399).
"""

from dataclasses import replace

from tgi_shard.layers.moe import SigmoidTopK
from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import (
    MLP,
    Attention,
    DecoderSpec,
    Dims,
    HFConfig,
    MoE,
    Norm,
    Temperature,
    read_rope,
)
from tgi_shard.weights import names

MODEL_TYPES = ("llama4_text",)

NAMES = replace(
    names.LLAMA,
    mlp_in=("feed_forward.gate_proj", "feed_forward.up_proj"),
    mlp_out="feed_forward.down_proj",
    experts=names.Experts(
        router="feed_forward.router",
        mlp_in=("feed_forward.experts.{expert}.gate_up",),
        mlp_out="feed_forward.experts.{expert}.down",
        stacked=(
            ("feed_forward.experts.{expert}.gate_up.weight", "feed_forward.experts.gate_up_proj"),
            ("feed_forward.experts.{expert}.down.weight", "feed_forward.experts.down_proj"),
        ),
        shared_in=("feed_forward.shared_expert.gate_proj", "feed_forward.shared_expert.up_proj"),
        shared_out="feed_forward.shared_expert.down_proj",
    ),
)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    dims = Dims.read(config)
    rope = read_rope(config, rope_override, is_interleaved=True)
    temperature = None
    if config.attn_temperature_tuning:
        temperature = Temperature(config.attn_scale, config.floor_scale)
    return DecoderSpec(
        dims=dims,
        norm=Norm("rms", eps=config.rms_norm_eps),
        attention=Attention(
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            rope=None,
            layer_ropes=tuple(rope if is_rotary else None for is_rotary in config.no_rope_layers),
            normalises_rotated=config.use_qk_norm,
            unrotated_temperature=temperature,
            stretches=tuple(
                config.attention_chunk_size if kind == "chunked_attention" else None
                for kind in config.layer_types
            ),
        ),
        mlp=MLP(config.intermediate_size_mlp, config.hidden_act, is_gated=True, has_bias=False),
        moe=MoE(
            num_experts=config.num_local_experts,
            intermediate_size=config.intermediate_size,
            activation=config.hidden_act,
            routing=SigmoidTopK(config.num_experts_per_tok),
            weighs_inputs=True,
            layers=tuple(layer in config.moe_layers for layer in range(dims.num_layers)),
            shared_size=config.intermediate_size,
            in_layout="in_out",
            out_layout="in_out",
        ),
        names=NAMES,
        has_tied_head=config.tie_word_embeddings,
    )
