"""BART (arXiv:1910.13461): learned positions, a norm on every sum, biases, and one on the scores."""

from tgi_shard.models.encoder_decoder.spec import EncoderDecoderSpec, Stack, StackNames
from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import HFConfig, UnsupportedModel, refuse_rope_override

MODEL_TYPES = ("bart",)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> EncoderDecoderSpec:
    refuse_rope_override(config, rope_override, "learned")
    if config.encoder_attention_heads != config.decoder_attention_heads:
        raise UnsupportedModel("bart models whose encoder and decoder differ in heads are not supported")
    head_dim = config.d_model // config.encoder_attention_heads
    return EncoderDecoderSpec(
        hidden_size=config.d_model,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        # There are so many positions for each of the two; together no longer, neither can run out of them.
        max_positions=config.max_position_embeddings,
        encoder=_stack(
            "encoder", config.encoder_layers, config.encoder_attention_heads, config.encoder_ffn_dim
        ),
        decoder=_stack(
            "decoder", config.decoder_layers, config.decoder_attention_heads, config.decoder_ffn_dim
        ),
        embedding="model.shared",
        head="lm_head",
        norm="layer",
        norm_eps=1e-5,
        norms="of_sum",
        activation=config.activation_function,
        has_biases=True,
        attention_scale=head_dim**-0.5,
        max_learned_positions=config.max_position_embeddings,
        position_offset=2,
        embedding_scale=config.d_model**0.5 if config.scale_embedding else 1.0,
        logit_bias="final_logits_bias",
    )


def _stack(name: str, num_layers: int, num_heads: int, intermediate_size: int) -> Stack:
    names = StackNames(
        layer=f"model.{name}.layers.{{layer}}.",
        attention=_attention("self_attn."),
        attention_norm="self_attn_layer_norm",
        cross_attention=_attention("encoder_attn.") if name == "decoder" else None,
        cross_attention_norm="encoder_attn_layer_norm" if name == "decoder" else None,
        mlp_in=("fc1",),
        mlp_out="fc2",
        mlp_norm="final_layer_norm",
        positions=f"model.{name}.embed_positions",
        embedding_norm=f"model.{name}.layernorm_embedding",
    )
    return Stack(names, num_layers, num_heads, intermediate_size)


def _attention(prefix: str) -> tuple[str, str, str, str]:
    return (f"{prefix}q_proj", f"{prefix}k_proj", f"{prefix}v_proj", f"{prefix}out_proj")
