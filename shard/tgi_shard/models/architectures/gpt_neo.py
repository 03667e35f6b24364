"""GPT-Neo (EleutherAI 2021): learned positions, scores that are not scaled, every other layer windowed."""

from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import MLP, Attention, DecoderSpec, Dims, HFConfig, Norm, refuse_rope_override
from tgi_shard.weights.names import Names

MODEL_TYPES = ("gpt_neo",)

NAMES = Names(
    prefix="transformer.",
    embedding="wte",
    position_embedding="wpe",
    head="lm_head",
    final_norm="ln_f",
    layer="h.{layer}.",
    attention_norm="ln_1",
    qkv=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
    attention_out="attn.attention.out_proj",
    mlp_norm="ln_2",
    mlp_in=("mlp.c_fc",),
    mlp_out="mlp.c_proj",
)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    refuse_rope_override(config, rope_override, "learned")
    dims = Dims.read(config)
    windows = (config.window_size if kind == "local" else None for kind in config.attention_layers)
    return DecoderSpec(
        dims=dims,
        norm=Norm("layer", eps=config.layer_norm_epsilon, has_bias=True),
        attention=Attention(
            qkv_bias=False,
            out_bias=True,
            rope=None,
            scales=(1.0,) * dims.num_layers,
            windows=tuple(windows),
        ),
        mlp=MLP(
            intermediate_size=config.intermediate_size or 4 * dims.hidden_size,
            activation=config.activation_function,
            is_gated=False,
            has_bias=True,
        ),
        names=NAMES,
        has_tied_head=config.tie_word_embeddings,
    )
