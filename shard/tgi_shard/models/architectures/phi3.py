"""Phi 3 and 4 (arXiv:2404.14219): Llama's layer with fused projections; longrope where contexts are long."""

from dataclasses import replace

from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import MLP, Attention, DecoderSpec, Dims, HFConfig, Norm, read_rope
from tgi_shard.weights import names

MODEL_TYPES = ("phi3",)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    dims = Dims.read(config)
    return DecoderSpec(
        dims=dims,
        norm=Norm("rms", eps=config.rms_norm_eps),
        attention=Attention(
            qkv_bias=False,
            out_bias=False,
            rope=read_rope(config, rope_override, is_partial=True),
            windows=None if config.sliding_window is None else (config.sliding_window,) * dims.num_layers,
        ),
        mlp=MLP(
            intermediate_size=config.intermediate_size,
            activation=config.hidden_act,
            is_gated=True,
            has_bias=False,
        ),
        names=replace(names.LLAMA, qkv=("self_attn.qkv_proj",), mlp_in=("mlp.gate_up_proj",)),
        has_tied_head=config.tie_word_embeddings,
    )
