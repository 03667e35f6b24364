"""SmolLM 3 (Hugging Face 2025): Llama's layer; every fourth one does not rotate."""

from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import MLP, Attention, DecoderSpec, Dims, HFConfig, Norm, layer_windows, read_rope
from tgi_shard.weights import names

MODEL_TYPES = ("smollm3",)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    rope = read_rope(config, rope_override)
    return DecoderSpec(
        dims=Dims.read(config),
        norm=Norm("rms", eps=config.rms_norm_eps),
        attention=Attention(
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            rope=None,
            layer_ropes=tuple(rope if rotates else None for rotates in config.no_rope_layers),
            windows=layer_windows(config) if config.use_sliding_window else None,
        ),
        mlp=MLP(
            intermediate_size=config.intermediate_size,
            activation=config.hidden_act,
            is_gated=True,
            has_bias=config.mlp_bias,
        ),
        names=names.LLAMA,
        has_tied_head=config.tie_word_embeddings,
    )
