"""What recurrent models have in common: an embedding, layers of norm and mixer on a residual, and a head."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tgi_shard.distributed import Group
from tgi_shard.layers.causal_conv import ConvPlaces
from tgi_shard.layers.embedding import Head, TokenEmbedding, vocab_rows
from tgi_shard.layers.norm import RMSNorm, WideRMSNorm
from tgi_shard.layers.selective_scan import Schedule
from tgi_shard.layers.state_space_dual import Chunks
from tgi_shard.models.spec import HFConfig
from tgi_shard.quantization.dense import Dense
from tgi_shard.state_cache import StateCache, StateShape
from tgi_shard.step import StepInputs
from tgi_shard.weights.loading import Weights

HEAD = "lm_head"

AnySchedule = Schedule | Chunks
MakeSchedule = Callable[[tuple[int, ...], torch.device], AnySchedule]  # from query_lens


@dataclass(frozen=True, slots=True)
class Dims:
    vocab_size: int
    hidden_size: int
    num_layers: int
    norm_eps: float
    has_float_residual: bool  # the sum over layers stays in float32 whatever the dtype
    has_tied_head: bool

    @classmethod
    def read(cls, config: HFConfig) -> "Dims":
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            norm_eps=config.layer_norm_epsilon,
            has_float_residual=config.residual_in_fp32,
            has_tied_head=config.tie_word_embeddings,
        )


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of a step share."""

    cache: StateCache
    blocks: Tensor  # [R] int64: whose state is where
    begins: Tensor | None  # [R] bool: rows whose first token this is; None: no row's
    places: ConvPlaces
    schedule: AnySchedule  # the order in which the mixers take the tokens

    @classmethod
    def of(cls, inputs: StepInputs, cache: StateCache, make_schedule: MakeSchedule) -> "Step":
        begins = None
        if any(map(int.__eq__, inputs.query_lens, inputs.context_lens_host)):
            begins = inputs.context_lens == inputs.query_starts.diff()
        num_taps = cache.histories[0].shape[1] + 1
        return cls(
            cache,
            inputs.block_tables[:, 0],
            begins,
            ConvPlaces.of(inputs.query_starts, len(inputs.token_ids), num_taps),
            make_schedule(inputs.query_lens, inputs.token_ids.device),
        )


class Mixer(Protocol):
    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """[T, hidden] -> [T, hidden], fresh; reads and writes the rows' states."""
        ...


@dataclass(frozen=True, slots=True)
class Layer:
    norm: RMSNorm
    mixer: Mixer


@dataclass(frozen=True, slots=True)
class RecurrentModel:
    kv_shape: StateShape
    embedding: TokenEmbedding
    layers: tuple[Layer, ...]
    final_norm: WideRMSNorm
    head: Head
    has_float_residual: bool
    dtype: torch.dtype
    make_schedule: MakeSchedule

    def forward(self, inputs: StepInputs, kv_cache: StateCache) -> Tensor:
        step = Step.of(inputs, kv_cache, self.make_schedule)
        hidden = self.embedding(inputs.token_ids)
        if self.has_float_residual:
            hidden = hidden.float()
        for layer in self.layers:
            hidden.add_(layer.mixer(layer.norm(hidden.to(self.dtype)), step))
        hidden = self.final_norm(hidden.index_select(0, inputs.logit_indices))
        return self.head(hidden.to(self.dtype))


def load(
    dims: Dims,
    kv_shape: StateShape,
    weights: Weights,
    group: Group,
    load_mixer: Callable[[int, str], Mixer],
    make_schedule: MakeSchedule,
) -> RecurrentModel:
    """load_mixer: from a layer's number and the prefix of its mixer's names."""
    size = dims.hidden_size
    embedding = "backbone.embeddings"
    if f"{embedding}.weight" not in weights and "backbone.embedding.weight" in weights:
        embedding = "backbone.embedding"  # the authors' own exports
    table = head_table = vocab_rows(weights, embedding, dims.vocab_size, size, group)
    layers = []
    for layer in range(dims.num_layers):
        prefix = f"backbone.layers.{layer}."
        norm = RMSNorm(weights.read(f"{prefix}norm.weight", (size,)), dims.norm_eps)
        layers.append(Layer(norm, load_mixer(layer, f"{prefix}mixer.")))
    final_norm = WideRMSNorm(weights.read("backbone.norm_f.weight", (size,)).float(), dims.norm_eps)
    if not dims.has_tied_head or f"{HEAD}.weight" in weights:
        head_table = vocab_rows(weights, HEAD, dims.vocab_size, size, group)
        # On the meta device, where memory is estimated, there is nothing to compare.
        if dims.has_tied_head and (table.is_meta or torch.equal(head_table, table)):
            head_table = table  # one copy is enough
    method = Dense()
    return RecurrentModel(
        kv_shape=kv_shape,
        embedding=TokenEmbedding.of(table, dims.vocab_size, group),
        layers=tuple(layers),
        final_norm=final_norm,
        head=Head(method, method.prepare({"weight": head_table}), None, dims.vocab_size, group),
        has_float_residual=dims.has_float_residual,
        dtype=weights.dtype,
        make_schedule=make_schedule,
    )


def read_float(weights: Weights, name: str, shape: tuple[int, ...], cut: tuple[int, int]) -> Tensor:
    """Rows `cut` of a parameter that is used in float32."""
    return weights.read(name, shape, {0: cut}).float()
