"""GPT-NeoX and Pythia (arXiv:2204.06745): two norms side by side, QKV fused head by head, partial rotary."""

from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import MLP, Attention, DecoderSpec, Dims, HFConfig, Norm, read_rope
from tgi_shard.weights.names import Names

MODEL_TYPES = ("gpt_neox",)

NAMES = Names(
    prefix="gpt_neox.",
    embedding="embed_in",
    head="embed_out",
    final_norm="final_layer_norm",
    layer="layers.{layer}.",
    attention_norm="input_layernorm",
    qkv=("attention.query_key_value",),
    attention_out="attention.dense",
    mlp_norm="post_attention_layernorm",
    mlp_in=("mlp.dense_h_to_4h",),
    mlp_out="mlp.dense_4h_to_h",
)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    return DecoderSpec(
        dims=Dims.read(config),
        norm=Norm("layer", eps=config.layer_norm_eps, has_bias=True),
        residual="parallel" if config.use_parallel_residual else "sequential",
        attention=Attention(
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            rope=read_rope(config, rope_override, is_partial=True),
            qkv_layout="groups",
        ),
        mlp=MLP(
            intermediate_size=config.intermediate_size,
            activation=config.hidden_act,
            is_gated=False,
            has_bias=True,
        ),
        names=NAMES,
        has_tied_head=config.tie_word_embeddings,
    )
