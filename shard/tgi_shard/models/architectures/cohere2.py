"""Command R7B and A (Cohere 2024): Command R with windowed layers that rotate and full ones that do not."""

from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import MLP, Attention, DecoderSpec, Dims, HFConfig, Norm, layer_windows, read_rope
from tgi_shard.weights import names

MODEL_TYPES = ("cohere2",)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    rope = read_rope(config, rope_override, is_interleaved=True)
    is_windowed = [kind == "sliding_attention" for kind in config.layer_types]
    return DecoderSpec(
        dims=Dims.read(config),
        norm=Norm("layer", eps=config.layer_norm_eps),
        residual="parallel_one_norm",
        attention=Attention(
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            rope=None,
            layer_ropes=tuple(rope if windowed else None for windowed in is_windowed),
            windows=layer_windows(config),
        ),
        mlp=MLP(
            intermediate_size=config.intermediate_size,
            activation=config.hidden_act,
            is_gated=True,
            has_bias=False,
        ),
        names=names.LLAMA,
        has_tied_head=config.tie_word_embeddings,
        logit_scale=config.logit_scale,
    )
