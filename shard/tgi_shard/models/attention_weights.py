"""A rank's part of an attention layer: its query heads, and the KV heads that they attend with."""

import torch
from torch import Tensor

from tgi_shard.layers.linear import Piece, column_parallel, row_parallel
from tgi_shard.layers.qk_norm import AllHeadsNorm, HeadNorm, QKNorm
from tgi_shard.layers.rotary import Rope
from tgi_shard.models.decoder import AttentionLayer
from tgi_shard.models.part import Part, pieces
from tgi_shard.models.spec import Attention


def load_attention(part: Part, layer: int, prefix: str, ropes: tuple[Rope, ...]) -> AttentionLayer:
    dims, attention, names = part.spec.dims, part.spec.attention, part.spec.names
    rope = rope_of(attention, layer)
    first, stop = query_heads(part)
    return AttentionLayer(
        index=layer,
        heads=part.heads,
        scale=dims.head_dim**-0.5 if attention.scales is None else attention.scales[layer],
        window=None if attention.windows is None else attention.windows[layer],
        stretch=None if attention.stretches is None else attention.stretches[layer],
        softcap=attention.softcap,
        slopes=None
        if attention.alibi is None
        else torch.tensor(attention.alibi[first:stop], dtype=torch.float32, device=part.weights.device),
        sinks=_sinks(part, prefix) if attention.has_sinks else None,
        clip=attention.clip_qkv,
        rotation=None if rope is None else ropes.index(rope),
        qkv=column_parallel(
            part.weights, part.method, _qkv_pieces(part, prefix), dims.hidden_size, attention.qkv_bias
        ),
        qk_norm=None if attention.qk_norm is None else _qk_norm(part, prefix),
        rotated_norm=None if rope is None or not attention.normalises_rotated else _rotated_norm(part),
        has_temperature=rope is None and attention.unrotated_temperature is not None,
        out=row_parallel(
            part.weights,
            part.method,
            prefix + names.attention_out,
            dims.num_heads * dims.head_dim,
            dims.hidden_size,
            attention.out_bias,
            part.group,
            is_summed=part.is_summed,
        ),
    )


def rope_of(attention: Attention, layer: int) -> Rope | None:
    return attention.rope if attention.layer_ropes is None else attention.layer_ropes[layer]


def query_heads(part: Part) -> tuple[int, int]:
    return part.local(part.spec.dims.num_heads)


def kv_heads(part: Part) -> tuple[int, int]:
    """Fewer KV heads than ranks: neighbours share one."""
    first = part.group.rank * part.spec.dims.num_kv_heads // part.group.world_size
    return first, first + part.heads.num_kv_heads


def _qkv_pieces(part: Part, prefix: str) -> list[Piece]:
    """This rank's query, key and value features."""
    dims, names = part.spec.dims, part.spec.names
    queries, keys = query_heads(part), kv_heads(part)
    if part.spec.attention.qkv_layout == "groups":
        (module,) = names.qkv
        return _grouped_pieces(part, prefix + module, queries, keys)
    num_heads = [dims.num_heads, dims.num_kv_heads, dims.num_kv_heads]
    return pieces(
        prefix,
        names.qkv,
        [count * dims.head_dim for count in num_heads],
        [(first * dims.head_dim, stop * dims.head_dim) for first, stop in (queries, keys, keys)],
    )


def _grouped_pieces(part: Part, module: str, queries: tuple[int, int], keys: tuple[int, int]) -> list[Piece]:
    """The same out of a module that holds, KV head by KV head, its queries, its key and its value."""
    dims = part.spec.dims
    group = dims.num_heads // dims.num_kv_heads
    num_slots = dims.num_kv_heads * (group + 2)

    def piece(first: int, stop: int) -> Piece:
        return Piece(module, first * dims.head_dim, stop * dims.head_dim, num_slots * dims.head_dim)

    query_runs = []
    for kv_head in range(*keys):
        first = max(queries[0], kv_head * group)
        stop = min(queries[1], (kv_head + 1) * group)
        # Before a query head stand the keys and values of the groups before its own.
        query_runs.append(piece(first + 2 * kv_head, stop + 2 * kv_head))
    key_slots = [kv_head * (group + 2) + group for kv_head in range(*keys)]
    return [
        *query_runs,
        *(piece(slot, slot + 1) for slot in key_slots),
        *(piece(slot + 1, slot + 2) for slot in key_slots),
    ]


def _qk_norm(part: Part, prefix: str) -> QKNorm:
    spec, norm = part.spec, part.spec.norm
    weight = _norm_rows(part, prefix, "weight")
    if spec.attention.qk_norm == "all_heads":
        assert norm.kind == "rms"
        return AllHeadsNorm(weight, part.heads.num_heads, norm.eps, part.group)
    if norm.is_offset:
        weight = weight.float() + 1
    bias = _norm_rows(part, prefix, "bias") if spec.attention.qk_norm_bias else None
    return HeadNorm(norm.kind, weight, bias, norm.eps)


def _rotated_norm(part: Part) -> HeadNorm:
    """Without a weight; in float32."""
    ones = torch.ones(1, part.spec.dims.head_dim, device=part.weights.device)
    return HeadNorm("rms", ones, None, part.spec.norm.eps)


def _norm_rows(part: Part, prefix: str, suffix: str) -> Tensor:
    """[local query and key heads, head_dim]."""
    dims, names = part.spec.dims, part.spec.names
    assert names.query_norm is not None
    assert names.key_norm is not None
    return torch.cat(
        [
            _heads_norm_rows(part, prefix + names.query_norm, suffix, dims.num_heads, query_heads(part)),
            _heads_norm_rows(part, prefix + names.key_norm, suffix, dims.num_kv_heads, kv_heads(part)),
        ]
    )


def _heads_norm_rows(part: Part, module: str, suffix: str, num_heads: int, local: tuple[int, int]) -> Tensor:
    size, (first, stop) = part.spec.dims.head_dim, local
    name = f"{module}.{suffix}"
    if part.spec.attention.qk_norm == "per_head":
        return part.weights.read(name, (size,)).expand(stop - first, -1)
    if part.spec.attention.qk_norm == "all_heads":
        whole = part.weights.read(name, (num_heads * size,), {0: (first * size, stop * size)})
        return whole.view(-1, size)
    if "{head}" in module:
        return torch.stack(
            [part.weights.read(name.format(head=head), (size,)) for head in range(first, stop)]
        )
    return part.weights.read(name, (num_heads, size), {0: (first, stop)})


def _sinks(part: Part, prefix: str) -> Tensor:
    assert part.spec.names.sinks is not None
    name = prefix + part.spec.names.sinks
    return part.weights.read(name, (part.spec.dims.num_heads,), {0: query_heads(part)}).float()
