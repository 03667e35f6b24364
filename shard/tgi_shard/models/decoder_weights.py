"""A rank's part of a decoder, read from a checkpoint: what is cut where, and what each rank repeats.

Query heads, KV heads, MLP features and vocabulary are divided; norms and learned positions are on every rank.
"""

from dataclasses import dataclass

import torch

from tgi_shard.attention.backend import Heads
from tgi_shard.attention.reference import ReferenceAttention
from tgi_shard.distributed import Group
from tgi_shard.kv_cache import KVShape
from tgi_shard.layers.activation import ACTIVATIONS
from tgi_shard.layers.embedding import Head, PositionEmbedding, TokenEmbedding, vocab_rows
from tgi_shard.layers.linear import Piece, column_parallel, row_parallel
from tgi_shard.layers.norm import AnyNorm, LayerNorm, RMSNorm
from tgi_shard.layers.rotary import Rotary
from tgi_shard.models.decoder import AttentionLayer, Decoder, DecoderLayer, MLPLayer, QKNorm
from tgi_shard.models.spec import DecoderSpec, UnsupportedModel
from tgi_shard.quantization.dense import Dense
from tgi_shard.weights.loading import Weights


def check_group(spec: DecoderSpec, world_size: int) -> None:
    """Raise UnsupportedModel unless that many ranks can share the model evenly."""
    dims = spec.dims
    for what, size in (("attention heads", dims.num_heads), ("MLP features", spec.mlp.intermediate_size)):
        if size % world_size:
            raise UnsupportedModel(
                f"the model's {size} {what} cannot be divided evenly among {world_size} shards"
            )
    if dims.num_kv_heads % world_size and world_size % dims.num_kv_heads:
        raise UnsupportedModel(
            f"the model's {dims.num_kv_heads} key-value heads can neither be divided among nor repeated on "
            f"{world_size} shards"
        )


def load(spec: DecoderSpec, weights: Weights, group: Group) -> Decoder:
    """Read this rank's weights. Raises CheckpointError that names what is missing or has another shape."""
    return _Loader.of(spec, weights, group).decoder()


@dataclass(frozen=True, slots=True)
class _Loader:
    spec: DecoderSpec
    weights: Weights
    group: Group
    prefix: str
    heads: Heads  # this rank's
    method: Dense

    @classmethod
    def of(cls, spec: DecoderSpec, weights: Weights, group: Group) -> "_Loader":
        names, dims = spec.names, spec.dims
        is_bare = f"{names.embedding}.weight" in weights  # an export of the decoder alone
        heads = Heads(
            num_heads=dims.num_heads // group.world_size,
            num_kv_heads=max(1, dims.num_kv_heads // group.world_size),
            head_dim=dims.head_dim,
        )
        return cls(spec, weights, group, "" if is_bare else names.prefix, heads, Dense(spec.weight_layout))

    def decoder(self) -> Decoder:
        spec, dims, names, weights = self.spec, self.spec.dims, self.spec.names, self.weights
        embedding = self._embedding()
        positions = None
        if names.position_embedding is not None:
            module = self.prefix + names.position_embedding
            positions = PositionEmbedding.load(weights, module, dims.max_positions, dims.hidden_size)
        rotary = None
        if spec.attention.rope is not None:
            rotary = Rotary.of(spec.attention.rope, dims.head_dim, weights.dtype, weights.device)
        layers = tuple(self._layer(index) for index in range(dims.num_layers))
        final_norm = self._norm(self.prefix + names.final_norm)
        head = self._head(embedding)
        return Decoder(
            kv_shape=KVShape(dims.num_layers, self.heads.num_kv_heads, dims.head_dim, weights.dtype),
            embedding=embedding,
            positions=positions,
            rotary=rotary,
            layers=layers,
            final_norm=final_norm,
            head=head,
            attention=ReferenceAttention(self.heads),
        )

    def _embedding(self) -> TokenEmbedding:
        dims, names = self.spec.dims, self.spec.names
        module = self.prefix + names.embedding
        if self.spec.has_tied_head and f"{module}.weight" not in self.weights:
            module = names.head  # exports may hold either of the two
        table = vocab_rows(self.weights, module, dims.vocab_size, dims.hidden_size, self.group)
        return TokenEmbedding.of(table, dims.vocab_size, self.group)

    def _head(self, embedding: TokenEmbedding) -> Head:
        dims, module, table = self.spec.dims, self.spec.names.head, embedding.table
        if not self.spec.has_tied_head or f"{module}.weight" in self.weights:
            own = vocab_rows(self.weights, module, dims.vocab_size, dims.hidden_size, self.group)
            # A checkpoint may hold a head that its config calls tied: if they differ, the config is wrong.
            is_copy = self.spec.has_tied_head and torch.equal(own, table)
            table = table if is_copy else own
        return Head.of(table, Dense(), dims.vocab_size, self.group)

    def _layer(self, index: int) -> DecoderLayer:
        names = self.spec.names
        prefix = self.prefix + names.layer.format(layer=index)
        return DecoderLayer(
            attention_norm=self._norm(prefix + names.attention_norm),
            attention=self._attention(index, prefix),
            mlp_norm=self._norm(prefix + names.mlp_norm),
            mlp=self._mlp(prefix),
        )

    def _norm(self, module: str) -> AnyNorm:
        size = (self.spec.dims.hidden_size,)
        weight = self.weights.read(f"{module}.weight", size)
        if self.spec.norm.kind == "rms":
            return RMSNorm(weight, self.spec.norm.eps)
        return LayerNorm(weight, self.weights.read(f"{module}.bias", size), self.spec.norm.eps)

    def _attention(self, index: int, prefix: str) -> AttentionLayer:
        dims, attention, names = self.spec.dims, self.spec.attention, self.spec.names
        return AttentionLayer(
            index=index,
            heads=self.heads,
            scale=dims.head_dim**-0.5 if attention.scales is None else attention.scales[index],
            window=None if attention.windows is None else attention.windows[index],
            qkv=column_parallel(
                self.weights, self.method, self._qkv_pieces(prefix), dims.hidden_size, attention.qkv_bias
            ),
            qk_norm=self._qk_norm(prefix) if attention.qk_norm == "per_head" else None,
            out=row_parallel(
                self.weights,
                self.method,
                prefix + names.attention_out,
                dims.num_heads * dims.head_dim,
                dims.hidden_size,
                attention.out_bias,
                self.group,
            ),
        )

    def _qkv_pieces(self, prefix: str) -> list[Piece]:
        """This rank's query, key and value features. Fewer KV heads than ranks: neighbours share one."""
        dims, (rank, world_size) = self.spec.dims, (self.group.rank, self.group.world_size)
        num_features = [
            count * dims.head_dim for count in (dims.num_heads, dims.num_kv_heads, dims.num_kv_heads)
        ]
        first_heads = [rank * self.heads.num_heads, *[rank * dims.num_kv_heads // world_size] * 2]
        num_local_heads = [self.heads.num_heads, self.heads.num_kv_heads, self.heads.num_kv_heads]
        starts = [first * dims.head_dim for first in first_heads]
        stops = [start + count * dims.head_dim for start, count in zip(starts, num_local_heads, strict=True)]
        return _pieces(prefix, self.spec.names.qkv, num_features, starts, stops)

    def _qk_norm(self, prefix: str) -> QKNorm:
        names, size = self.spec.names, (self.spec.dims.head_dim,)
        assert names.query_norm is not None
        assert names.key_norm is not None
        query = self.weights.read(f"{prefix}{names.query_norm}.weight", size)
        key = self.weights.read(f"{prefix}{names.key_norm}.weight", size)
        rows = [query] * self.heads.num_heads + [key] * self.heads.num_kv_heads
        return QKNorm(torch.stack(rows), self.spec.norm.eps)

    def _mlp(self, prefix: str) -> MLPLayer:
        dims, mlp, names = self.spec.dims, self.spec.mlp, self.spec.names
        local = mlp.intermediate_size // self.group.world_size
        start = self.group.rank * local
        count = 2 if mlp.is_gated else 1
        pieces = _pieces(
            prefix, names.mlp_in, [mlp.intermediate_size] * count, [start] * count, [start + local] * count
        )
        return MLPLayer(
            inner=column_parallel(self.weights, self.method, pieces, dims.hidden_size, mlp.has_bias),
            activation=ACTIVATIONS[mlp.activation],
            is_gated=mlp.is_gated,
            out=row_parallel(
                self.weights,
                self.method,
                prefix + names.mlp_out,
                mlp.intermediate_size,
                dims.hidden_size,
                mlp.has_bias,
                self.group,
            ),
        )


def _pieces(
    prefix: str, modules: tuple[str, ...], num_features: list[int], starts: list[int], stops: list[int]
) -> list[Piece]:
    """Sections of sizes `num_features`, each a module of its own or one after another in a single module."""
    if len(modules) == len(num_features):
        return [
            Piece(prefix + module, start, stop, total)
            for module, start, stop, total in zip(modules, starts, stops, num_features, strict=True)
        ]
    (module,) = modules
    offsets = [sum(num_features[:index]) for index in range(len(num_features))]
    return [
        Piece(prefix + module, offset + start, offset + stop, sum(num_features))
        for offset, start, stop in zip(offsets, starts, stops, strict=True)
    ]
