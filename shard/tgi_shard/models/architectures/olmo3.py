"""OLMo 3 (Ai2 2025): OLMo 2 with windowed layers, whose rotary positions are never scaled."""

from dataclasses import replace

from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import MLP, Attention, DecoderSpec, Dims, HFConfig, Norm, layer_windows, read_rope
from tgi_shard.weights import names

MODEL_TYPES = ("olmo3",)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    ropes = {
        "full_attention": read_rope(config, rope_override, layer_type="full_attention"),
        "sliding_attention": read_rope(config, None, layer_type="sliding_attention"),
    }
    return DecoderSpec(
        dims=Dims.read(config),
        norm=Norm("rms", eps=config.rms_norm_eps),
        norms="after",
        attention=Attention(
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            rope=None,
            layer_ropes=tuple(ropes[kind] for kind in config.layer_types),
            qk_norm="all_heads",
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
