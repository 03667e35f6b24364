"""Every trait by which encoder-decoder models differ, as frozen data: T5's kind and BART's."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class StackNames:
    """The checkpoint's modules of the encoder, or of the decoder; those of a layer follow `layer`."""

    layer: str  # "encoder.block.{layer}."
    attention: tuple[str, str, str, str]  # query, key, value, out
    attention_norm: str
    mlp_in: tuple[str, ...]  # a gated MLP: the gate, then what it gates
    mlp_out: str
    mlp_norm: str
    cross_attention: tuple[str, str, str, str] | None = None  # the decoder's
    cross_attention_norm: str | None = None
    final_norm: str | None = None
    positions: str | None = None  # learned
    embedding_norm: str | None = None
    relative_bias: str | None = None  # one for all layers


@dataclass(frozen=True, slots=True)
class RelativePositions:
    num_buckets: int
    max_distance: int


@dataclass(frozen=True, slots=True)
class Stack:
    names: StackNames
    num_layers: int
    num_heads: int
    intermediate_size: int


@dataclass(frozen=True, slots=True)
class EncoderDecoderSpec:
    hidden_size: int
    head_dim: int
    vocab_size: int
    max_positions: int  # of a prompt and its answer together, each as long as the model was made for
    encoder: Stack
    decoder: Stack
    embedding: str  # modules of the whole model
    head: str
    norm: Literal["rms", "layer"]
    norm_eps: float
    norms: Literal["before", "of_sum"]  # on what attention and the MLP read, or on the sum with what they say
    activation: str
    has_biases: bool
    attention_scale: float
    relative: RelativePositions | None = None
    max_learned_positions: int = 0
    position_offset: int = 0  # the row of the learned positions that is position 0's
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_bias: str | None = None  # a tensor [1, vocab_size]
    overflows_float16: bool = False  # what its layers add up leaves float16's range
