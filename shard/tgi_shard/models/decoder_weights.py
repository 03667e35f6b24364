"""A rank's part of a decoder, read from a checkpoint: what is cut where, and what each rank repeats.

Query heads, KV heads, MLP features and vocabulary are divided; norms, routers and learned positions are on
every rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tgi_shard.attention.backend import Heads
from tgi_shard.distributed import Group
from tgi_shard.kv_cache import KVShape
from tgi_shard.layers.embedding import Head, PositionEmbedding, TokenEmbedding, vocab_rows
from tgi_shard.layers.linear import Linear, replicated
from tgi_shard.layers.mlp import MLP
from tgi_shard.layers.norm import AnyNorm
from tgi_shard.layers.rotary import Rope, Rotary
from tgi_shard.models.attention_weights import load_attention, rope_of
from tgi_shard.models.decoder import (
    AnyAttention,
    Decoder,
    DecoderLayer,
    Embedding,
    NormedSumLayer,
    ParallelLayer,
    SequentialLayer,
)
from tgi_shard.models.latent_attention_weights import load_latent_attention
from tgi_shard.models.mlp_weights import load_mlp
from tgi_shard.models.numerics import Numerics
from tgi_shard.models.part import Part
from tgi_shard.models.spec import DecoderSpec, UnsupportedModel
from tgi_shard.weights.loading import Weights


def check(spec: DecoderSpec, group: Group) -> None:
    """Raise UnsupportedModel unless the group's ranks can share the model evenly."""
    dims, moe, world_size = spec.dims, spec.moe, group.world_size
    divided = [("attention heads", dims.num_heads), ("MLP features", spec.mlp.intermediate_size)]
    if moe is not None:
        divided = [("attention heads", dims.num_heads), ("features of an expert", moe.intermediate_size)]
        if not all(moe.layers):
            divided.append(("MLP features", spec.mlp.intermediate_size))
        if moe.shared_size is not None:
            divided.append(("features of the shared expert", moe.shared_size))
    for what, size in divided:
        if size % world_size:
            raise UnsupportedModel(
                f"the model's {size} {what} cannot be divided evenly among {world_size} shards"
            )
    if dims.num_kv_heads % world_size and world_size % dims.num_kv_heads:
        raise UnsupportedModel(
            f"the model's {dims.num_kv_heads} key-value heads can neither be divided among nor repeated on "
            f"{world_size} shards"
        )


def load(spec: DecoderSpec, numerics: Numerics, weights: Weights, group: Group) -> Decoder:
    """Read this rank's weights. Raises CheckpointError that names what is missing or has another shape."""
    dims, names = spec.dims, spec.names
    is_bare = f"{names.embedding}.weight" in weights  # an export of the decoder alone
    heads = Heads(
        num_heads=dims.num_heads // group.world_size,
        num_kv_heads=max(1, dims.num_kv_heads // group.world_size),
        head_dim=dims.head_dim,
    )
    prefix = "" if is_bare else names.prefix
    part = Part(spec, weights, group, prefix, heads, numerics, numerics.dense(spec.weight_layout))
    all_ropes = (rope_of(spec.attention, layer) for layer in range(dims.num_layers))
    ropes = tuple(dict.fromkeys(rope for rope in all_ropes if rope is not None))
    table = _embedding_table(part)
    embedding = _embedding(part, table)
    layers = tuple(_layer(part, layer, ropes) for layer in range(dims.num_layers))
    return Decoder(
        kv_shape=KVShape(
            dims.num_layers,
            heads.num_kv_heads,
            dims.head_dim,
            weights.dtype,
            has_values=spec.attention.latents is None,
        ),
        embedding=embedding,
        rotaries=tuple(Rotary.of(rope, dims.head_dim, weights.dtype, weights.device) for rope in ropes),
        temperature=spec.attention.unrotated_temperature,
        layers=layers,
        final_norm=_norm(part, prefix, names.final_norm),
        project_out=_projection(part, names.project_out, dims.hidden_size, _embedding_size(part)),
        head=_head(part, table),
        attention=numerics.attention(heads),
    )


def _norm(part: Part, prefix: str, module: str | None) -> AnyNorm | None:
    return None if module is None else part.norm(prefix + module)


def _embedding_size(part: Part) -> int:
    return part.spec.dims.embedding_size or part.spec.dims.hidden_size


def _embedding_table(part: Part) -> Tensor:
    spec, names = part.spec, part.spec.names
    module = part.prefix + names.embedding
    if spec.has_tied_head and f"{module}.weight" not in part.weights:
        module = names.head  # exports may hold either of the two
    return vocab_rows(part.weights, module, spec.dims.vocab_size, _embedding_size(part), part.group)


def _embedding(part: Part, table: Tensor) -> Embedding:
    spec, dims, names = part.spec, part.spec.dims, part.spec.names
    positions = None
    if names.position_embedding is not None:
        module = part.prefix + names.position_embedding
        positions = PositionEmbedding.load(
            part.weights, module, dims.max_positions, dims.hidden_size, spec.position_offset
        )
    return Embedding(
        tokens=TokenEmbedding.of(table, dims.vocab_size, part.group),
        # Rounded as the models were trained with it.
        scale=float(torch.tensor(spec.embedding_scale, dtype=part.weights.dtype)),
        project=_projection(part, names.project_in, _embedding_size(part), dims.hidden_size),
        positions=positions,
        norm=_norm(part, part.prefix, names.embedding_norm),
    )


def _projection(part: Part, module: str | None, in_features: int, out_features: int) -> Linear | None:
    if module is None:
        return None
    return replicated(
        part.weights, part.method, part.prefix + module, in_features, out_features, has_bias=False
    )


def _head(part: Part, table: Tensor) -> Head:
    spec, dims, module, weights = part.spec, part.spec.dims, part.spec.names.head, part.weights
    if not spec.has_tied_head or f"{module}.weight" in weights:
        own = vocab_rows(weights, module, dims.vocab_size, _embedding_size(part), part.group)
        # A checkpoint may hold a head that its config calls tied: if they differ, the config is wrong.
        # On the meta device there is nothing to compare: the estimate takes the config at its word.
        is_copy = spec.has_tied_head and (table.is_meta or torch.equal(own, table))
        table = table if is_copy else own
    if spec.has_unit_head:
        table = F.normalize(table.float(), dim=-1).to(table.dtype)
    bias = weights.read(f"{module}.bias", (dims.vocab_size,)).float() if spec.head_bias else None
    method = part.numerics.dense("out_in")
    return Head(
        method=method,
        tensors=method.prepare({"weight": table}),
        bias=bias,
        vocab_size=dims.vocab_size,
        group=part.group,
        scale=spec.logit_scale,
        softcap=spec.logit_softcap,
    )


def _layer(part: Part, layer: int, ropes: tuple[Rope, ...]) -> DecoderLayer:
    spec, names = part.spec, part.spec.names
    prefix = part.prefix + names.layer.format(layer=layer)
    latents = spec.attention.latents
    attention: AnyAttention
    if latents is None:
        attention = load_attention(part, layer, prefix, ropes)
    else:
        attention = load_latent_attention(part, latents, layer, prefix, ropes)
    mlp = load_mlp(part, layer, prefix)
    if spec.norms == "before" and spec.residual != "sequential":
        assert names.attention_norm is not None
        assert isinstance(mlp, MLP)
        mlp_norm = names.mlp_norm if spec.residual == "parallel" else None
        return ParallelLayer(
            part.norm(prefix + names.attention_norm),
            attention,
            _norm(part, prefix, mlp_norm),
            mlp,
            part.group,
        )
    assert spec.residual == "sequential"
    if spec.norms == "of_sum":
        assert names.attention_norm is not None
        assert names.mlp_norm is not None
        assert isinstance(mlp, MLP)
        return NormedSumLayer(
            attention, part.norm(prefix + names.attention_norm), mlp, part.norm(prefix + names.mlp_norm)
        )
    before, after = spec.norms in ("before", "around"), spec.norms in ("after", "around")
    return SequentialLayer(
        attention_norm=_norm(part, prefix, names.attention_norm if before else None),
        attention=attention,
        post_attention_norm=_norm(part, prefix, names.post_attention_norm if after else None),
        mlp_norm=_norm(part, prefix, names.mlp_norm if before else None),
        mlp=mlp,
        post_mlp_norm=_norm(part, prefix, names.post_mlp_norm if after else None),
        scale=spec.residual_scale,
    )
