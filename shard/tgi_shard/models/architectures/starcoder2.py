"""StarCoder 2 (arXiv:2402.19173): LayerNorms, a plain MLP, biases, perhaps a sliding window."""

from dataclasses import replace

from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import MLP, Attention, DecoderSpec, Dims, HFConfig, Norm, read_rope
from tgi_shard.weights import names

MODEL_TYPES = ("starcoder2",)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    dims = Dims.read(config)
    return DecoderSpec(
        dims=dims,
        norm=Norm("layer", eps=config.norm_epsilon, has_bias=True),
        attention=Attention(
            qkv_bias=config.use_bias,
            out_bias=config.use_bias,
            rope=read_rope(config, rope_override),
            windows=None if config.sliding_window is None else (config.sliding_window,) * dims.num_layers,
        ),
        mlp=MLP(
            intermediate_size=config.intermediate_size,
            activation=config.hidden_act,
            is_gated=False,
            has_bias=config.use_bias,
        ),
        names=replace(names.LLAMA, mlp_in=("mlp.c_fc",), mlp_out="mlp.c_proj"),
        has_tied_head=config.tie_word_embeddings,
    )
