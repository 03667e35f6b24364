"""GLM-4 9B (arXiv:2406.12793): a part of each head rotated, interleaved; biases on query, key and value."""

from dataclasses import replace

from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import MLP, Attention, DecoderSpec, Dims, HFConfig, Norm, read_rope
from tgi_shard.weights import names

MODEL_TYPES = ("glm",)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    return DecoderSpec(
        dims=Dims.read(config),
        norm=Norm("rms", eps=config.rms_norm_eps),
        attention=Attention(
            qkv_bias=config.attention_bias,
            out_bias=False,
            rope=read_rope(config, rope_override, is_partial=True, is_interleaved=True),
        ),
        mlp=MLP(
            intermediate_size=config.intermediate_size,
            activation=config.hidden_act,
            is_gated=True,
            has_bias=False,
        ),
        names=replace(names.LLAMA, mlp_in=("mlp.gate_up_proj",)),
        has_tied_head=config.tie_word_embeddings,
    )
