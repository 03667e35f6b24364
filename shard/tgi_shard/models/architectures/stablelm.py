"""StableLM (arXiv:2402.17834): LayerNorms, partial rotary, perhaps parallel and a norm on every head."""

from dataclasses import replace

from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import MLP, Attention, DecoderSpec, Dims, HFConfig, Norm, read_rope
from tgi_shard.weights import names

MODEL_TYPES = ("stablelm",)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    return DecoderSpec(
        dims=Dims.read(config),
        norm=Norm("layer", eps=config.layer_norm_eps, has_bias=True),
        residual="parallel_one_norm" if config.use_parallel_residual else "sequential",
        attention=Attention(
            qkv_bias=config.use_qkv_bias,
            out_bias=False,
            rope=read_rope(config, rope_override, is_partial=True),
            qk_norm="each_head" if config.qk_layernorm else None,
        ),
        mlp=MLP(
            intermediate_size=config.intermediate_size,
            activation=config.hidden_act,
            is_gated=True,
            has_bias=False,
        ),
        names=replace(
            names.LLAMA,
            query_norm="self_attn.q_layernorm.norms.{head}",
            key_norm="self_attn.k_layernorm.norms.{head}",
        ),
        has_tied_head=config.tie_word_embeddings,
    )
