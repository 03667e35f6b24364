"""OLMo 2 (arXiv:2501.00656): norms on what attention and MLP say, and over all query and all key heads."""

from dataclasses import replace

from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import MLP, Attention, DecoderSpec, Dims, HFConfig, Norm, read_rope
from tgi_shard.weights import names

MODEL_TYPES = ("olmo2",)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    return DecoderSpec(
        dims=Dims.read(config),
        norm=Norm("rms", eps=config.rms_norm_eps),
        norms="after",
        attention=Attention(
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            rope=read_rope(config, rope_override),
            qk_norm="all_heads",
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
