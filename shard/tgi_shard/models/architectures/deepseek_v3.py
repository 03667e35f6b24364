"""DeepSeek V3, V3.1 and R1 (arXiv:2412.19437): latent attention; corrected sigmoids choose the experts."""

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
    latent_scale,
    read_rope,
)
from tgi_shard.weights import names

MODEL_TYPES = ("deepseek_v3",)


def spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
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
    rope = read_rope(config, rope_override, is_interleaved=config.rope_interleave)
    table = names.DEEPSEEK_LITE if latents.query_rank is None else names.DEEPSEEK
    assert table.experts is not None
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
            routing=GroupedTopK(
                num_chosen=config.num_experts_per_tok,
                is_renormalised=config.norm_topk_prob,
                scoring="sigmoid",
                scale=config.routed_scaling_factor,
                num_groups=config.n_group,
                num_chosen_groups=config.topk_group,
                num_judged=2,
            ),
            layers=tuple(layer >= config.first_k_dense_replace for layer in range(dims.num_layers)),
            shared_size=config.n_shared_experts * config.moe_intermediate_size,
            has_wide_router=True,
        ),
        names=replace(table, experts=replace(table.experts, correction="mlp.gate.e_score_correction_bias")),
        has_tied_head=config.tie_word_embeddings,
    )
