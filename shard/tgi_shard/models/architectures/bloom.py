"""BLOOM (arXiv:2211.05100): ALiBi in place of positions, a norm of the embeddings, fused QKV head by head."""

from tgi_shard.models import alibi
from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import (
    MLP,
    Attention,
    DecoderSpec,
    Dims,
    HFConfig,
    Norm,
    UnsupportedModel,
    refuse_rope_override,
)
from tgi_shard.weights.names import Names

MODEL_TYPES = ("bloom",)

NAMES = Names(
    prefix="transformer.",
    embedding="word_embeddings",
    embedding_norm="word_embeddings_layernorm",
    head="lm_head",
    final_norm="ln_f",
    layer="h.{layer}.",
    attention_norm="input_layernorm",
    qkv=("self_attention.query_key_value",),
    attention_out="self_attention.dense",
    mlp_norm="post_attention_layernorm",
    mlp_in=("mlp.dense_h_to_4h",),
    mlp_out="mlp.dense_4h_to_h",
)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    refuse_rope_override(config, rope_override, "in ALiBi's distances")
    if config.apply_residual_connection_post_layernorm:
        raise UnsupportedModel(
            "bloom models that add to the normed states (apply_residual_connection_post_layernorm) are not "
            "supported"
        )
    dims = Dims(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        max_positions=getattr(config, "seq_length", 2048),  # as trained: distances have no end
    )
    return DecoderSpec(
        dims=dims,
        norm=Norm("layer", eps=config.layer_norm_epsilon, has_bias=True),
        attention=Attention(
            qkv_bias=True,
            out_bias=True,
            rope=None,
            alibi=alibi.powers_of_two(dims.num_heads),
            qkv_layout="groups",
        ),
        mlp=MLP(
            intermediate_size=4 * dims.hidden_size,
            activation="gelu_pytorch_tanh",
            is_gated=False,
            has_bias=True,
        ),
        names=NAMES,
        has_tied_head=config.tie_word_embeddings,
    )
