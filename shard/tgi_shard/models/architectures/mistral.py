"""Mistral 7B and successors (arXiv:2310.06825): no biases, heads of any size, perhaps a sliding window."""

from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import MLP, Attention, DecoderSpec, Dims, HFConfig, Norm, read_rope
from tgi_shard.weights import names

MODEL_TYPES = ("mistral",)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    dims = Dims.read(config)
    return DecoderSpec(
        dims=dims,
        norm=Norm("rms", eps=config.rms_norm_eps),
        attention=Attention(
            qkv_bias=False,
            out_bias=False,
            rope=read_rope(config, rope_override),
            windows=None if config.sliding_window is None else (config.sliding_window,) * dims.num_layers,
        ),
        mlp=MLP(
            intermediate_size=config.intermediate_size,
            activation=config.hidden_act,
            is_gated=True,
            has_bias=False,
        ),
        names=names.LLAMA,
        has_tied_head=config.tie_word_embeddings,
    )
