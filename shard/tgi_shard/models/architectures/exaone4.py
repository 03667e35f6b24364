"""EXAONE 4 (arXiv:2507.11407): norms on outputs and on every head; full layers do not rotate."""

from dataclasses import replace

from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import MLP, Attention, DecoderSpec, Dims, HFConfig, Norm, layer_windows, read_rope
from tgi_shard.weights import names

MODEL_TYPES = ("exaone4",)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    rope = read_rope(config, rope_override)
    # A model without windows rotates in all its layers.
    rotates = [config.sliding_window is None or kind == "sliding_attention" for kind in config.layer_types]
    return DecoderSpec(
        dims=Dims.read(config),
        norm=Norm("rms", eps=config.rms_norm_eps),
        norms="after",
        attention=Attention(
            qkv_bias=False,
            out_bias=False,
            rope=None,
            layer_ropes=tuple(rope if rotated else None for rotated in rotates),
            qk_norm="per_head",
            windows=layer_windows(config),
        ),
        mlp=MLP(
            intermediate_size=config.intermediate_size,
            activation=config.hidden_act,
            is_gated=True,
            has_bias=False,
        ),
        names=replace(
            names.LLAMA,
            attention_norm=None,
            post_attention_norm="post_attention_layernorm",
            mlp_norm=None,
            post_mlp_norm="post_feedforward_layernorm",
            query_norm="self_attn.q_norm",
            key_norm="self_attn.k_norm",
        ),
        has_tied_head=config.tie_word_embeddings,
    )
