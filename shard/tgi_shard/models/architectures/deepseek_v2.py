"""DeepSeek V2 and V2 Lite (arXiv:2405.04434): latent attention; experts in groups, some for all tokens."""

from dataclasses import replace

from tgi_shard.layers.moe import GroupedTopK
from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import (
    MLP,
    Attention,
    DecoderSpec,
    Dims,
    HFConfig,
    Latents,
    MoE,
    Norm,
    UnsupportedModel,
    latent_scale,
    read_rope,
)
from tgi_shard.weights import names

MODEL_TYPES = ("deepseek_v2",)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    for field in ("norm_topk_prob", "mlp_bias"):
        if getattr(config, field):
            raise UnsupportedModel(f"deepseek_v2 models with {field} are not supported")
    latents = Latents(
        query_rank=config.q_lora_rank,
        kv_rank=config.kv_lora_rank,
        plain_dim=config.qk_nope_head_dim,
        rope_dim=config.qk_rope_head_dim,
        value_dim=config.v_head_dim,
        norm_eps=1e-6,
    )
    dims = Dims(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=1,
        head_dim=latents.kv_rank + latents.rope_dim,
        max_positions=config.max_position_embeddings,
    )
    rope = read_rope(config, rope_override, is_interleaved=True)
    return DecoderSpec(
        dims=dims,
        norm=Norm("rms", eps=config.rms_norm_eps),
        attention=Attention(
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            rope=replace(rope, rotary_dim=latents.rope_dim),
            scales=(latent_scale(config, rope_override),) * dims.num_layers,
            latents=latents,
        ),
        mlp=MLP(config.intermediate_size, config.hidden_act, is_gated=True, has_bias=False),
        moe=MoE(
            num_experts=config.n_routed_experts,
            intermediate_size=config.moe_intermediate_size,
            activation=config.hidden_act,
            routing=_routing(config),
            layers=tuple(layer >= config.first_k_dense_replace for layer in range(dims.num_layers)),
            shared_size=config.n_shared_experts * config.moe_intermediate_size,
            has_wide_router=True,
        ),
        names=names.DEEPSEEK_LITE if latents.query_rank is None else names.DEEPSEEK,
        has_tied_head=config.tie_word_embeddings,
    )


def _routing(config: HFConfig) -> GroupedTopK:
    routing = GroupedTopK(
        num_chosen=config.num_experts_per_tok,
        is_renormalised=False,
        scoring="softmax",
        scale=config.routed_scaling_factor,
    )
    if config.topk_method == "greedy":
        return routing
    if config.topk_method == "group_limited_greedy":
        return replace(routing, num_groups=config.n_group, num_chosen_groups=config.topk_group)
    raise UnsupportedModel(
        f"topk_method {config.topk_method!r} is not supported for deepseek_v2 models, only 'greedy' and "
        f"'group_limited_greedy' are"
    )
