"""The one decoder: what a step does with the layers that a rank holds. It knows traits, no names."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tgi_shard.attention.backend import AttentionBackend, AttentionPlan, Heads
from tgi_shard.distributed import Group
from tgi_shard.kv_cache import KVCache, KVShape
from tgi_shard.layers.embedding import Head, PositionEmbedding, TokenEmbedding
from tgi_shard.layers.linear import Linear
from tgi_shard.layers.mlp import MLP
from tgi_shard.layers.moe import MoE
from tgi_shard.layers.norm import AnyNorm
from tgi_shard.layers.qk_norm import HeadNorm, QKNorm
from tgi_shard.layers.rotary import Rotary, Rotation
from tgi_shard.models.spec import Temperature
from tgi_shard.step import StepInputs


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of a step share."""

    plan: AttentionPlan
    rotations: tuple[Rotation, ...]  # one for each kind of rotary positions that the model has
    temperatures: Tensor | None  # [num_tokens, 1, 1] float32, on queries, see spec.Temperature


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    index: int
    heads: Heads
    scale: float
    window: int | None
    stretch: int | None
    softcap: float | None
    slopes: Tensor | None  # [num_heads] float32, see Attention.alibi
    sinks: Tensor | None  # [num_heads] float32
    clip: float | None
    rotation: int | None  # in Step.rotations
    qkv: Linear
    qk_norm: QKNorm | None
    rotated_norm: HeadNorm | None  # after the rotation
    has_temperature: bool
    out: Linear

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        num_heads, num_kv_heads = self.heads.num_heads, self.heads.num_kv_heads
        heads = self.qkv(x).view(len(x), num_heads + 2 * num_kv_heads, self.heads.head_dim)
        query_and_key = heads[:, : num_heads + num_kv_heads]
        if self.qk_norm is not None:
            self.qk_norm.apply_(query_and_key)
        if self.clip is not None:
            heads.clamp_(-self.clip, self.clip)
        if self.rotation is not None:
            step.rotations[self.rotation].apply_(query_and_key)
        if self.rotated_norm is not None:
            self.rotated_norm.apply_(query_and_key)
        if self.has_temperature:
            assert step.temperatures is not None
            heads[:, :num_heads].mul_(step.temperatures)
        attended = step.plan.attend(
            self.index,
            heads[:, :num_heads],
            heads[:, num_heads:].unflatten(1, (2, num_kv_heads)),
            scale=self.scale,
            window=self.window,
            stretch=self.stretch,
            softcap=self.softcap,
            slopes=self.slopes,
            sinks=self.sinks,
        )
        return self.out(attended)


class AnyAttention(Protocol):
    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """[num_tokens, hidden] -> [num_tokens, hidden], fresh."""
        ...


class DecoderLayer(Protocol):
    def apply_(self, hidden: Tensor, step: Step) -> None:
        """In place on [num_tokens, hidden]."""
        ...


@dataclass(frozen=True, slots=True)
class SequentialLayer:
    """Attention, then the MLP, each with norms on what it reads, on what it says, or on both."""

    attention_norm: AnyNorm | None
    attention: AnyAttention
    post_attention_norm: AnyNorm | None
    mlp_norm: AnyNorm | None
    mlp: MLP | MoE
    post_mlp_norm: AnyNorm | None
    scale: float  # on what is added

    def apply_(self, hidden: Tensor, step: Step) -> None:
        x = hidden if self.attention_norm is None else self.attention_norm(hidden)
        x = self.attention(x, step)
        if self.post_attention_norm is not None:
            x = self.post_attention_norm(x)
        hidden.add_(self._scaled_(x))
        x = hidden if self.mlp_norm is None else self.mlp_norm(hidden)
        x = self.mlp(x)
        if self.post_mlp_norm is not None:
            x = self.post_mlp_norm(x)
        hidden.add_(self._scaled_(x))

    def _scaled_(self, x: Tensor) -> Tensor:
        """Rounded before it is added, as transformers does."""
        return x if self.scale == 1.0 else x.mul_(self.scale)


@dataclass(frozen=True, slots=True)
class ParallelLayer:
    """Attention and the MLP side by side; their outputs are summed over ranks together."""

    attention_norm: AnyNorm
    attention: AnyAttention
    mlp_norm: AnyNorm | None  # None: the MLP reads what attention reads
    mlp: MLP
    group: Group

    def apply_(self, hidden: Tensor, step: Step) -> None:
        normed = self.attention_norm(hidden)
        mlp_input = normed if self.mlp_norm is None else self.mlp_norm(hidden)
        hidden.add_(self.group.all_reduce(self.attention(normed, step).add_(self.mlp(mlp_input))))


@dataclass(frozen=True, slots=True)
class NormedSumLayer:
    """Attention, then the MLP, each followed by a norm of the sum, as in the first Transformer."""

    attention: AnyAttention
    attention_norm: AnyNorm
    mlp: MLP
    mlp_norm: AnyNorm

    def apply_(self, hidden: Tensor, step: Step) -> None:
        hidden.copy_(self.attention_norm(hidden + self.attention(hidden, step)))
        hidden.copy_(self.mlp_norm(hidden + self.mlp(hidden)))


@dataclass(frozen=True, slots=True)
class Embedding:
    """From token ids and positions to the first hidden states."""

    tokens: TokenEmbedding
    scale: float
    project: Linear | None
    positions: PositionEmbedding | None
    norm: AnyNorm | None

    def __call__(self, inputs: StepInputs) -> Tensor:
        """[num_tokens, hidden], fresh."""
        hidden = self.tokens(inputs.token_ids)
        if self.scale != 1.0:
            hidden.mul_(self.scale)
        if self.project is not None:
            hidden = self.project(hidden)
        if self.positions is not None:
            self.positions.add_to(hidden, inputs.positions)
        return hidden if self.norm is None else self.norm(hidden)


@dataclass(frozen=True, slots=True)
class Decoder:
    kv_shape: KVShape
    embedding: Embedding
    rotaries: tuple[Rotary, ...]
    temperature: Temperature | None
    layers: tuple[DecoderLayer, ...]
    final_norm: AnyNorm | None
    project_out: Linear | None
    head: Head
    attention: AttentionBackend

    def forward(self, inputs: StepInputs, kv_cache: KVCache) -> Tensor:
        hidden = self.embedding(inputs)
        rotations = tuple(rotary.at(inputs.positions) for rotary in self.rotaries)
        temperatures = None if self.temperature is None else _temperatures(self.temperature, inputs.positions)
        step = Step(self.attention.plan(inputs, kv_cache), rotations, temperatures)
        for layer in self.layers:
            layer.apply_(hidden, step)
        hidden = hidden.index_select(0, inputs.logit_indices)
        if self.final_norm is not None:
            hidden = self.final_norm(hidden)
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        return self.head(hidden)


def _temperatures(temperature: Temperature, positions: Tensor) -> Tensor:
    num_intervals = torch.floor((positions.float() + 1) / temperature.interval)
    return (1 + temperature.strength * torch.log1p(num_intervals)).view(-1, 1, 1)
