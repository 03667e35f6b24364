"""An encoder-decoder model as the engine runs it: what a step does with the layers that a rank holds.

A sequence's prompt is the encoder's text, then the decoder's start token. The step in which it begins runs
the encoder over the whole text and the decoder over the rest; every later one runs the decoder alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tgi_shard.attention.encoder_decoder import LayerMemory, Layout, SourceAttention, TargetAttention
from tgi_shard.kv_cache import KVCache, KVShape
from tgi_shard.layers.embedding import Head, PositionEmbedding, TokenEmbedding
from tgi_shard.layers.linear import Linear
from tgi_shard.layers.mlp import MLP
from tgi_shard.layers.norm import AnyNorm
from tgi_shard.layers.relative_bias import RelativeBias
from tgi_shard.step import StepInputs


@dataclass(frozen=True, slots=True)
class Residual:
    """What attention or the MLP says is added to what it reads."""

    norm: AnyNorm
    is_of_sum: bool  # else of what is read

    def apply_(self, hidden: Tensor, function: Callable[[Tensor], Tensor]) -> None:
        """In place on [tokens, hidden]."""
        if self.is_of_sum:
            hidden.copy_(self.norm(hidden + function(hidden)))
        else:
            hidden.add_(function(self.norm(hidden)))


@dataclass(frozen=True, slots=True)
class SelfAttention:
    head_dim: int
    qkv: Linear
    out: Linear

    def project(self, x: Tensor) -> Tensor:
        """[tokens, 3, heads, head_dim]."""
        return self.qkv(x).view(len(x), 3, -1, self.head_dim)


@dataclass(frozen=True, slots=True)
class CrossAttention:
    head_dim: int
    query: Linear
    key_value: Linear  # of the encoder's output
    out: Linear

    def project(self, x: Tensor) -> Tensor:
        """[tokens, heads, head_dim]."""
        return self.query(x).view(len(x), -1, self.head_dim)

    def project_source(self, encoded: Tensor) -> Tensor:
        """[tokens, 2, heads, head_dim]."""
        return self.key_value(encoded).view(len(encoded), 2, -1, self.head_dim)


@dataclass(frozen=True, slots=True)
class EncoderLayer:
    attention_residual: Residual
    attention: SelfAttention
    mlp_residual: Residual
    mlp: MLP

    def apply_(self, hidden: Tensor, source: SourceAttention) -> None:
        def attend(x: Tensor) -> Tensor:
            return self.attention.out(source.attend(self.attention.project(x)))

        self.attention_residual.apply_(hidden, attend)
        self.mlp_residual.apply_(hidden, self.mlp)


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    index: int
    attention_residual: Residual
    attention: SelfAttention
    cross_attention_residual: Residual
    cross_attention: CrossAttention
    mlp_residual: Residual
    mlp: MLP

    def apply_(self, hidden: Tensor, encoded: Tensor | None, target: TargetAttention) -> None:
        """encoded: the encoder's output for the prompts of this step; None: there are none."""
        of_source = None if encoded is None else self.cross_attention.project_source(encoded)
        memory: LayerMemory

        def attend_own(x: Tensor) -> Tensor:
            nonlocal memory
            heads = self.attention.project(x)
            memory = target.remember(self.index, of_source, heads[:, 1:])
            return self.attention.out(target.attend_own(memory, heads[:, 0]))

        def attend_source(x: Tensor) -> Tensor:
            attended = target.attend_source(memory, self.cross_attention.project(x))
            return self.cross_attention.out(attended)

        self.attention_residual.apply_(hidden, attend_own)
        self.cross_attention_residual.apply_(hidden, attend_source)
        self.mlp_residual.apply_(hidden, self.mlp)


@dataclass(frozen=True, slots=True)
class StackInput:
    """What stands before the layers of the encoder, or of the decoder."""

    positions: PositionEmbedding | None
    norm: AnyNorm | None

    def __call__(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """hidden: the tokens' embeddings, changed in place or not."""
        if self.positions is not None:
            self.positions.add_to(hidden, positions)
        return hidden if self.norm is None else self.norm(hidden)


@dataclass(frozen=True, slots=True)
class Encoder:
    input: StackInput
    layers: tuple[EncoderLayer, ...]
    bias: RelativeBias | None
    final_norm: AnyNorm | None

    def __call__(self, hidden: Tensor, positions: Tensor, layout: Layout, scale: float) -> Tensor:
        hidden = self.input(hidden, positions)
        source = SourceAttention(layout, self.bias, scale)
        for layer in self.layers:
            layer.apply_(hidden, source)
        return hidden if self.final_norm is None else self.final_norm(hidden)


@dataclass(frozen=True, slots=True)
class EncoderDecoder:
    kv_shape: KVShape
    num_start_tokens: int
    attention_scale: float
    embedding: TokenEmbedding
    embedding_scale: float
    encoder: Encoder
    decoder_input: StackInput
    decoder_layers: tuple[DecoderLayer, ...]
    decoder_bias: RelativeBias | None
    decoder_final_norm: AnyNorm | None
    head: Head

    def forward(self, inputs: StepInputs, kv_cache: KVCache) -> Tensor:
        layout = Layout.of(inputs, self.num_start_tokens)
        embedded = self.embedding(inputs.token_ids)
        if self.embedding_scale != 1.0:
            embedded.mul_(self.embedding_scale)
        encoded = None
        if layout.source_tokens is not None:
            encoded = self.encoder(
                embedded.index_select(0, layout.source_tokens),
                inputs.positions.index_select(0, layout.source_tokens),
                layout,
                self.attention_scale,
            )
        hidden = self.decoder_input(embedded.index_select(0, layout.target_tokens), layout.target_positions)
        target = TargetAttention.of(
            inputs, layout, kv_cache, self.decoder_bias, self.attention_scale, like=hidden
        )
        for layer in self.decoder_layers:
            layer.apply_(hidden, encoded, target)
        # Logits are asked for by the tokens' places in the step; only the decoder's have any.
        of_step = embedded.zero_().index_copy_(0, layout.target_tokens, hidden)
        hidden = of_step.index_select(0, inputs.logit_indices)
        if self.decoder_final_norm is not None:
            hidden = self.decoder_final_norm(hidden)
        return self.head(hidden)
