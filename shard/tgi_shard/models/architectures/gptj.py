"""GPT-J (EleutherAI 2021): parallel after one LayerNorm, a part of each head rotated, interleaved."""

from tgi_shard.layers.rotary import LinearScaling, Rope
from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import MLP, Attention, DecoderSpec, Dims, HFConfig, Norm
from tgi_shard.weights.names import Names

MODEL_TYPES = ("gptj",)

NAMES = Names(
    prefix="transformer.",
    embedding="wte",
    head="lm_head",
    final_norm="ln_f",
    layer="h.{layer}.",
    attention_norm="ln_1",
    qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    attention_out="attn.out_proj",
    mlp_in=("mlp.fc_in",),
    mlp_out="mlp.fc_out",
)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    dims = Dims.read(config)
    scaling = None if rope_override is None else LinearScaling(rope_override.factor)
    return DecoderSpec(
        dims=dims,
        norm=Norm("layer", eps=config.layer_norm_epsilon, has_bias=True),
        residual="parallel_one_norm",
        attention=Attention(
            qkv_bias=False,
            out_bias=False,
            rope=Rope(10000.0, scaling, config.rotary_dim, is_interleaved=True),
        ),
        mlp=MLP(
            intermediate_size=config.n_inner or 4 * dims.hidden_size,
            activation=config.activation_function,
            is_gated=False,
            has_bias=True,
        ),
        names=NAMES,
        has_tied_head=config.tie_word_embeddings,
        head_bias=True,
    )
