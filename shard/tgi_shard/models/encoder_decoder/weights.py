"""A rank's part of an encoder-decoder model, read from a checkpoint: heads, MLP features and vocabulary are
divided; norms and learned positions are on every rank.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tgi_shard.distributed import Group
from tgi_shard.kv_cache import KVShape
from tgi_shard.layers.activation import ACTIVATIONS, gate
from tgi_shard.layers.embedding import Head, PositionEmbedding, TokenEmbedding, vocab_rows
from tgi_shard.layers.linear import Linear, Piece, column_parallel, row_parallel
from tgi_shard.layers.mlp import MLP
from tgi_shard.layers.norm import AnyNorm, LayerNorm, RMSNorm
from tgi_shard.layers.relative_bias import RelativeBias
from tgi_shard.models.encoder_decoder.model import (
    CrossAttention,
    DecoderLayer,
    Encoder,
    EncoderDecoder,
    EncoderLayer,
    Residual,
    SelfAttention,
    StackInput,
)
from tgi_shard.models.encoder_decoder.spec import EncoderDecoderSpec, Stack
from tgi_shard.models.spec import UnsupportedModel
from tgi_shard.quantization.dense import Dense
from tgi_shard.weights.loading import Weights

# The embedding once more.
COPIES = tuple(
    f"{prefix}{stack}.embed_tokens.weight" for prefix in ("", "model.") for stack in ("encoder", "decoder")
)


def check(spec: EncoderDecoderSpec, group: Group) -> None:
    """Raise UnsupportedModel unless the group's ranks can share the model evenly."""
    if spec.activation not in ACTIVATIONS:
        raise UnsupportedModel(f"activation {spec.activation!r} is not supported")
    if spec.encoder.num_heads != spec.decoder.num_heads:
        raise UnsupportedModel(
            f"an encoder with {spec.encoder.num_heads} attention heads and a decoder with "
            f"{spec.decoder.num_heads} are not supported"
        )
    for stack in (spec.encoder, spec.decoder):
        for what, size in (("attention heads", stack.num_heads), ("MLP features", stack.intermediate_size)):
            if size % group.world_size:
                raise UnsupportedModel(
                    f"the model's {size} {what} cannot be divided evenly among {group.world_size} shards"
                )


def load(spec: EncoderDecoderSpec, num_start_tokens: int, weights: Weights, group: Group) -> EncoderDecoder:
    """Read this rank's weights. Raises CheckpointError that names what is missing or has another shape."""
    table = vocab_rows(weights, spec.embedding, spec.vocab_size, spec.hidden_size, group)
    encoder, decoder = (
        _Loader(spec, spec.encoder, weights, group),
        _Loader(spec, spec.decoder, weights, group),
    )
    return EncoderDecoder(
        kv_shape=KVShape(
            spec.decoder.num_layers, spec.decoder.num_heads // group.world_size, spec.head_dim, weights.dtype
        ),
        num_start_tokens=num_start_tokens,
        attention_scale=spec.attention_scale,
        embedding=TokenEmbedding.of(table, spec.vocab_size, group),
        embedding_scale=spec.embedding_scale,
        encoder=Encoder(
            input=encoder.input(),
            layers=tuple(encoder.encoder_layer(layer) for layer in range(spec.encoder.num_layers)),
            bias=encoder.relative_bias(sees_ahead=True),
            final_norm=encoder.final_norm(),
        ),
        decoder_input=decoder.input(),
        decoder_layers=tuple(decoder.decoder_layer(layer) for layer in range(spec.decoder.num_layers)),
        decoder_bias=decoder.relative_bias(sees_ahead=False),
        decoder_final_norm=decoder.final_norm(),
        head=_head(spec, weights, table, group),
    )


def _head(spec: EncoderDecoderSpec, weights: Weights, table: Tensor, group: Group) -> Head:
    if f"{spec.head}.weight" in weights:  # it may hold a copy of the embedding, or a head of its own
        own = vocab_rows(weights, spec.head, spec.vocab_size, spec.hidden_size, group)
        # On the meta device there is nothing to compare: the estimate counts both.
        is_copy = not table.is_meta and torch.equal(own, table)
        table = table if is_copy else own
    bias = None
    if spec.logit_bias is not None:
        bias = weights.read(spec.logit_bias, (1, spec.vocab_size)).squeeze(0).float()
    method = Dense()
    return Head(
        method=method,
        tensors=method.prepare({"weight": table}),
        bias=bias,
        vocab_size=spec.vocab_size,
        group=group,
        scale=spec.logit_scale,
    )


@dataclass(frozen=True, slots=True)
class _Loader:
    """Of the encoder, or of the decoder."""

    spec: EncoderDecoderSpec
    stack: Stack
    weights: Weights
    group: Group

    def input(self) -> StackInput:
        names, positions = self.stack.names, None
        if names.positions is not None:
            positions = PositionEmbedding.load(
                self.weights,
                names.positions,
                self.spec.max_learned_positions,
                self.spec.hidden_size,
                self.spec.position_offset,
            )
        return StackInput(
            positions, None if names.embedding_norm is None else self._norm(names.embedding_norm)
        )

    def final_norm(self) -> AnyNorm | None:
        name = self.stack.names.final_norm
        return None if name is None else self._norm(name)

    def relative_bias(self, *, sees_ahead: bool) -> RelativeBias | None:
        name, relative = self.stack.names.relative_bias, self.spec.relative
        if name is None or relative is None:
            return None
        return RelativeBias.load(
            self.weights,
            name,
            num_buckets=relative.num_buckets,
            max_distance=relative.max_distance,
            num_heads=self.stack.num_heads,
            heads=self._local(self.stack.num_heads),
            sees_ahead=sees_ahead,
        )

    def encoder_layer(self, layer: int) -> EncoderLayer:
        names, prefix = self.stack.names, self.stack.names.layer.format(layer=layer)
        return EncoderLayer(
            self._residual(prefix + names.attention_norm),
            self._self_attention(prefix),
            self._residual(prefix + names.mlp_norm),
            self._mlp(prefix),
        )

    def decoder_layer(self, layer: int) -> DecoderLayer:
        names, prefix = self.stack.names, self.stack.names.layer.format(layer=layer)
        assert names.cross_attention is not None
        assert names.cross_attention_norm is not None
        query, key, value, out = (prefix + module for module in names.cross_attention)
        return DecoderLayer(
            layer,
            self._residual(prefix + names.attention_norm),
            self._self_attention(prefix),
            self._residual(prefix + names.cross_attention_norm),
            CrossAttention(
                self.spec.head_dim, self._heads(query), self._heads(key, value), self._from_heads(out)
            ),
            self._residual(prefix + names.mlp_norm),
            self._mlp(prefix),
        )

    def _self_attention(self, prefix: str) -> SelfAttention:
        *qkv, out = (prefix + module for module in self.stack.names.attention)
        return SelfAttention(self.spec.head_dim, self._heads(*qkv), self._from_heads(out))

    def _heads(self, *modules: str) -> Linear:
        """This rank's heads of each module, one module after the other."""
        size = self.spec.head_dim
        first, stop = self._local(self.stack.num_heads)
        pieces = [Piece(module, first * size, stop * size, self.stack.num_heads * size) for module in modules]
        return column_parallel(self.weights, Dense(), pieces, self.spec.hidden_size, self.spec.has_biases)

    def _from_heads(self, module: str) -> Linear:
        return row_parallel(
            self.weights,
            Dense(),
            module,
            self.stack.num_heads * self.spec.head_dim,
            self.spec.hidden_size,
            self.spec.has_biases,
            self.group,
        )

    def _mlp(self, prefix: str) -> MLP:
        names, size = self.stack.names, self.stack.intermediate_size
        activation = ACTIVATIONS[self.spec.activation]
        first, stop = self._local(size)
        pieces = [Piece(prefix + module, first, stop, size) for module in names.mlp_in]
        return MLP(
            inner=column_parallel(self.weights, Dense(), pieces, self.spec.hidden_size, self.spec.has_biases),
            between=partial(gate, activation) if len(pieces) == 2 else activation,
            out=row_parallel(
                self.weights,
                Dense(),
                prefix + names.mlp_out,
                size,
                self.spec.hidden_size,
                self.spec.has_biases,
                self.group,
            ),
        )

    def _residual(self, module: str) -> Residual:
        return Residual(self._norm(module), self.spec.norms == "of_sum")

    def _norm(self, module: str) -> AnyNorm:
        size, eps = self.spec.hidden_size, self.spec.norm_eps
        weight = self.weights.read(f"{module}.weight", (size,))
        if self.spec.norm == "rms":
            return RMSNorm(weight, eps)
        return LayerNorm(size, weight, self.weights.read(f"{module}.bias", (size,)), eps)

    def _local(self, size: int) -> tuple[int, int]:
        """This rank's range of `size` features, which the group's size must divide."""
        num_local = size // self.group.world_size
        return self.group.rank * num_local, (self.group.rank + 1) * num_local
