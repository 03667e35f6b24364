"""Phi 1, 1.5 and 2 (arXiv:2309.05463): attention and MLP side by side after one LayerNorm, with biases."""

from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import MLP, Attention, DecoderSpec, Dims, HFConfig, Norm, read_rope
from tgi_shard.weights.names import Names

MODEL_TYPES = ("phi",)

NAMES = Names(
    prefix="model.",
    embedding="embed_tokens",
    head="lm_head",
    final_norm="final_layernorm",
    layer="layers.{layer}.",
    attention_norm="input_layernorm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    query_norm="self_attn.q_layernorm",
    key_norm="self_attn.k_layernorm",
    attention_out="self_attn.dense",
    mlp_in=("mlp.fc1",),
    mlp_out="mlp.fc2",
)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    return DecoderSpec(
        dims=Dims.read(config),
        norm=Norm("layer", eps=config.layer_norm_eps, has_bias=True),
        residual="parallel_one_norm",
        attention=Attention(
            qkv_bias=True,
            out_bias=True,
            rope=read_rope(config, rope_override, is_partial=True),
            qk_norm="per_head" if config.qk_layernorm else None,
            qk_norm_bias=True,
        ),
        mlp=MLP(
            intermediate_size=config.intermediate_size,
            activation=config.hidden_act,
            is_gated=False,
            has_bias=True,
        ),
        names=NAMES,
        has_tied_head=config.tie_word_embeddings,
        head_bias=True,
    )
