"""A rank's part of latent attention: its heads are its own; what leads to the latents is on every rank."""

from tgi_shard.layers.linear import Linear, Piece, column_parallel, row_parallel
from tgi_shard.layers.norm import RMSNorm
from tgi_shard.layers.rotary import Rope
from tgi_shard.models.latent_attention import LatentAttentionLayer
from tgi_shard.models.part import Part
from tgi_shard.models.spec import Latents


def load_latent_attention(
    part: Part, latents: Latents, layer: int, prefix: str, ropes: tuple[Rope, ...]
) -> LatentAttentionLayer:
    dims, attention, names = part.spec.dims, part.spec.attention, part.spec.names.latents
    assert names is not None
    assert attention.rope is not None
    assert attention.scales is not None
    first, stop = part.local(dims.num_heads)
    features = latents.plain_dim + latents.value_dim
    up = part.weights.read(
        f"{prefix}{names.kv_up}.weight",
        (dims.num_heads * features, latents.kv_rank),
        {0: (first * features, stop * features)},
    ).view(stop - first, features, latents.kv_rank)
    query_norm = None
    if latents.query_rank is not None:
        assert names.query_norm is not None
        query_norm = _norm(part, latents, prefix + names.query_norm, latents.query_rank)
    return LatentAttentionLayer(
        index=layer,
        scale=attention.scales[layer],
        rotation=ropes.index(attention.rope),
        num_heads=stop - first,
        num_plain=latents.plain_dim,
        query_rank=latents.query_rank or 0,
        down=_down(part, latents, prefix),
        query_norm=query_norm,
        query_up=_query_up(part, latents, prefix + names.query_up, (first, stop)),
        latent_norm=_norm(part, latents, prefix + names.kv_norm, latents.kv_rank),
        key_up=part.numerics.per_head(up[:, : latents.plain_dim].contiguous()),
        value_up=part.numerics.per_head(up[:, latents.plain_dim :].transpose(1, 2).contiguous()),
        out=row_parallel(
            part.weights,
            part.method,
            prefix + part.spec.names.attention_out,
            dims.num_heads * latents.value_dim,
            dims.hidden_size,
            attention.out_bias,
            part.group,
            is_summed=part.is_summed,
        ),
    )


def _norm(part: Part, latents: Latents, module: str, size: int) -> RMSNorm:
    return RMSNorm(part.weights.read(f"{module}.weight", (size,)), latents.norm_eps)


def _down(part: Part, latents: Latents, prefix: str) -> Linear:
    names = part.spec.names.latents
    assert names is not None
    sizes = [(names.kv_down, latents.kv_rank + latents.rope_dim)]
    if latents.query_rank is not None:
        assert names.query_down is not None
        sizes.insert(0, (names.query_down, latents.query_rank))
    whole = [Piece(prefix + module, 0, size, size) for module, size in sizes]
    return column_parallel(
        part.weights, part.method, whole, part.spec.dims.hidden_size, part.spec.attention.qkv_bias
    )


def _query_up(part: Part, latents: Latents, module: str, heads: tuple[int, int]) -> Linear:
    dims, size = part.spec.dims, latents.plain_dim + latents.rope_dim
    piece = Piece(module, heads[0] * size, heads[1] * size, dims.num_heads * size)
    in_features = latents.query_rank or dims.hidden_size
    return column_parallel(part.weights, part.method, [piece], in_features, has_bias=False)
