"""T5, T5 1.1, Flan-T5 and mT5 (Raffel et al. 2019): relative positions, unscaled scores, no biases."""

from tgi_shard.models.encoder_decoder.spec import EncoderDecoderSpec, RelativePositions, Stack, StackNames
from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import HFConfig, refuse_rope_override

MODEL_TYPES = ("t5", "mt5")

_TRAINED_LENGTH = 512  # of a prompt and of an answer; a config may not say


def spec(config: HFConfig, rope_override: RopeOverride | None) -> EncoderDecoderSpec:
    refuse_rope_override(config, rope_override, "relative")
    has_scaled_head = config.model_type == "t5" and getattr(
        config, "scale_decoder_outputs", config.tie_word_embeddings
    )
    return EncoderDecoderSpec(
        hidden_size=config.d_model,
        head_dim=config.d_kv,
        vocab_size=config.vocab_size,
        max_positions=2 * (getattr(config, "n_positions", None) or _TRAINED_LENGTH),
        encoder=_stack("encoder", config, config.num_layers),
        decoder=_stack("decoder", config, config.num_decoder_layers),
        embedding="shared",
        head="lm_head",
        norm="rms",
        norm_eps=config.layer_norm_epsilon,
        norms="before",
        activation=config.dense_act_fn,
        has_biases=False,
        attention_scale=1.0,
        relative=RelativePositions(
            config.relative_attention_num_buckets, config.relative_attention_max_distance
        ),
        logit_scale=config.d_model**-0.5 if has_scaled_head else 1.0,
        overflows_float16=True,
    )


def _stack(name: str, config: HFConfig, num_layers: int) -> Stack:
    mlp = f"layer.{2 if name == 'decoder' else 1}."
    names = StackNames(
        layer=f"{name}.block.{{layer}}.",
        attention=_attention("layer.0.SelfAttention."),
        attention_norm="layer.0.layer_norm",
        cross_attention=_attention("layer.1.EncDecAttention.") if name == "decoder" else None,
        cross_attention_norm="layer.1.layer_norm" if name == "decoder" else None,
        mlp_in=tuple(
            f"{mlp}DenseReluDense.{inner}" for inner in (("wi_0", "wi_1") if config.is_gated_act else ("wi",))
        ),
        mlp_out=f"{mlp}DenseReluDense.wo",
        mlp_norm=f"{mlp}layer_norm",
        final_norm=f"{name}.final_layer_norm",
        relative_bias=f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias",
    )
    return Stack(names, num_layers, config.num_heads, config.d_ff)


def _attention(prefix: str) -> tuple[str, str, str, str]:
    return (f"{prefix}q", f"{prefix}k", f"{prefix}v", f"{prefix}o")
