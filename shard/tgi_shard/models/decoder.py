"""The one decoder: what a step does with the layers that a rank holds. It knows traits, no names."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tgi_shard.attention.backend import AttentionBackend, AttentionPlan, Heads
from tgi_shard.kv_cache import KVCache, KVShape
from tgi_shard.layers.activation import Activation, gate
from tgi_shard.layers.embedding import Head, PositionEmbedding, TokenEmbedding
from tgi_shard.layers.linear import Linear
from tgi_shard.layers.norm import AnyNorm
from tgi_shard.layers.rotary import Rotary, Rotation
from tgi_shard.step import StepInputs


class Model(Protocol):
    """What the engine runs."""

    @property
    def kv_shape(self) -> KVShape: ...

    def forward(self, inputs: StepInputs, kv_cache: KVCache) -> Tensor:
        """One step: [L, vocab_size] float32 logits, whole on every rank; K and V are written to their slots.

        Under torch.inference_mode(), which is the caller's duty.
        """
        ...


@dataclass(frozen=True, slots=True)
class QKNorm:
    """An RMSNorm over each query and key head."""

    weight: Tensor  # [query and key heads, head_dim]
    eps: float

    def apply_(self, heads: Tensor) -> None:
        """In place on [num_tokens, query and key heads, head_dim]."""
        normed = torch.nn.functional.rms_norm(heads, heads.shape[-1:], None, self.eps)
        torch.mul(normed, self.weight, out=heads)


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    index: int
    heads: Heads
    scale: float
    window: int | None
    qkv: Linear
    qk_norm: QKNorm | None
    out: Linear

    def __call__(self, x: Tensor, rotation: Rotation | None, plan: AttentionPlan) -> Tensor:
        num_heads, num_kv_heads = self.heads.num_heads, self.heads.num_kv_heads
        heads = self.qkv(x).view(len(x), num_heads + 2 * num_kv_heads, self.heads.head_dim)
        query_and_key = heads[:, : num_heads + num_kv_heads]
        if self.qk_norm is not None:
            self.qk_norm.apply_(query_and_key)
        if rotation is not None:
            rotation.apply_(query_and_key)
        key_value = heads[:, num_heads:].unflatten(1, (2, num_kv_heads))
        attended = plan.attend(
            self.index, heads[:, :num_heads], key_value, scale=self.scale, window=self.window
        )
        return self.out(attended)


@dataclass(frozen=True, slots=True)
class MLPLayer:
    inner: Linear  # gate and up side by side if gated
    activation: Activation
    is_gated: bool
    out: Linear

    def __call__(self, x: Tensor) -> Tensor:
        inner = self.inner(x)
        return self.out(gate(self.activation, inner) if self.is_gated else self.activation(inner))


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    attention_norm: AnyNorm
    attention: AttentionLayer
    mlp_norm: AnyNorm
    mlp: MLPLayer


@dataclass(frozen=True, slots=True)
class Decoder:
    kv_shape: KVShape
    embedding: TokenEmbedding
    positions: PositionEmbedding | None
    rotary: Rotary | None
    layers: tuple[DecoderLayer, ...]
    final_norm: AnyNorm
    head: Head
    attention: AttentionBackend

    def forward(self, inputs: StepInputs, kv_cache: KVCache) -> Tensor:
        hidden = self.embedding(inputs.token_ids)
        if self.positions is not None:
            self.positions.add_to(hidden, inputs.positions)
        rotation = None if self.rotary is None else self.rotary.at(inputs.positions)
        plan = self.attention.plan(inputs, kv_cache)
        for layer in self.layers:
            hidden.add_(layer.attention(layer.attention_norm(hidden), rotation, plan))
            hidden.add_(layer.mlp(layer.mlp_norm(hidden)))
        return self.head(self.final_norm(hidden.index_select(0, inputs.logit_indices)))
