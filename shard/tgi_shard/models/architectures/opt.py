"""OPT and Galactica (arXiv:2205.01068): learned positions from row 2 on; the 350m one norms the sums."""

from dataclasses import replace

from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import MLP, Attention, DecoderSpec, Dims, HFConfig, Norm, refuse_rope_override
from tgi_shard.weights.names import Names

MODEL_TYPES = ("opt",)

NAMES = Names(
    prefix="model.",
    embedding="decoder.embed_tokens",
    position_embedding="decoder.embed_positions",
    head="lm_head",
    final_norm="decoder.final_layer_norm",
    layer="decoder.layers.{layer}.",
    attention_norm="self_attn_layer_norm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_out="self_attn.out_proj",
    mlp_norm="final_layer_norm",
    mlp_in=("fc1",),
    mlp_out="fc2",
)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    refuse_rope_override(config, rope_override, "learned")
    is_projected = config.word_embed_proj_dim != config.hidden_size
    has_final_norm = config.do_layer_norm_before and not config._remove_final_layer_norm
    has_parameters = config.layer_norm_elementwise_affine
    return DecoderSpec(
        dims=replace(Dims.read(config), embedding_size=config.word_embed_proj_dim),
        norm=Norm("layer", eps=1e-5, has_weight=has_parameters, has_bias=has_parameters),
        norms="before" if config.do_layer_norm_before else "of_sum",
        attention=Attention(qkv_bias=config.enable_bias, out_bias=config.enable_bias, rope=None),
        mlp=MLP(
            intermediate_size=config.ffn_dim,
            activation=config.activation_function,
            is_gated=False,
            has_bias=config.enable_bias,
        ),
        names=replace(
            NAMES,
            final_norm=NAMES.final_norm if has_final_norm else None,
            project_in="decoder.project_in" if is_projected else None,
            project_out="decoder.project_out" if is_projected else None,
        ),
        has_tied_head=config.tie_word_embeddings,
        position_offset=2,
    )
