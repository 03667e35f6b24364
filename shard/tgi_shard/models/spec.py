"""DecoderSpec: every trait by which decoders differ, as frozen data; architectures fill it."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from tgi_shard.layers.moe import Routing
from tgi_shard.layers.rotary import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    RopeScaling,
    YarnScaling,
)
from tgi_shard.model_folder import ModelError
from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.weights.names import Names

# A config object of transformers: its class knows the defaults of fields that config.json leaves away, and
# turns old spellings (rope_theta, rope_scaling, torch_dtype) into the present ones. Fields differ by family.
HFConfig = Any


class UnsupportedModel(ModelError):
    """We have no code for what the config asks for; one clear sentence that says what."""


def read_rope(
    config: HFConfig,
    override: RopeOverride | None,
    *,
    is_partial: bool = False,
    is_interleaved: bool = False,
    layer_type: str | None = None,
) -> Rope:
    """is_partial: the family may turn a part of each head. layer_type: whose parameters, where they differ.

    Raises UnsupportedModel for a kind of scaling that we do not compute.
    """
    parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    if "rope_theta" not in parameters:
        raise UnsupportedModel(
            f"rotary embeddings that differ by layer type are not supported for {config.model_type} models"
        )
    part = parameters.get("partial_rotary_factor")
    if part not in (None, 1.0) and not is_partial:
        raise UnsupportedModel(
            f"rotary embeddings on part of a head (partial_rotary_factor {part}) are not supported for "
            f"{config.model_type} models"
        )
    rotary_dim = None if part is None else int(head_dim(config) * part)
    if override is not None:
        scaling: RopeScaling | None = LinearScaling(override.factor)
    else:
        scaling = _scaling(parameters, config.max_position_embeddings)
    return Rope(float(parameters["rope_theta"]), scaling, rotary_dim, is_interleaved)


def refuse_two_way(config: HFConfig) -> None:
    """Raises UnsupportedModel for a model whose tokens see later ones: an encoder of texts, no decoder."""
    if config.use_bidirectional_attention:
        raise UnsupportedModel(
            f"{config.model_type} models with use_bidirectional_attention embed texts and generate none"
        )


def refuse_rope_override(config: HFConfig, override: RopeOverride | None, positions: str) -> None:
    """For families without rotary embeddings. Raises UnsupportedModel if one was given."""
    if override is not None:
        raise UnsupportedModel(
            f"rope scaling cannot be set for {config.model_type} models: their positions are {positions}, "
            f"not rotary"
        )


def _scaling(parameters: dict[str, Any], max_positions: int) -> RopeScaling | None:
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return None
    original = parameters.get("original_max_position_embeddings") or max_positions
    if kind == "linear":
        return LinearScaling(float(parameters["factor"]))
    if kind == "llama3":
        return Llama3Scaling(
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_max_positions=original,
        )
    if kind == "yarn":
        return YarnScaling(
            factor=float(parameters.get("factor") or max_positions / original),
            original_max_positions=original,
            attention_factor=parameters.get("attention_factor"),
            mscale=parameters.get("mscale"),
            mscale_all_dim=parameters.get("mscale_all_dim"),
            beta_fast=float(parameters.get("beta_fast") or 32),
            beta_slow=float(parameters.get("beta_slow") or 1),
            truncate=bool(parameters.get("truncate", True)),
        )
    if kind == "dynamic":
        return DynamicScaling(float(parameters["factor"]), max_positions)
    if kind == "longrope":
        return _longrope(parameters, max_positions, original)
    raise UnsupportedModel(
        f"rope scaling {kind!r} is not supported, only 'default', 'linear', 'dynamic', 'llama3', 'yarn' and "
        f"'longrope' are"
    )


def _longrope(parameters: dict[str, Any], max_positions: int, original: int) -> LongRopeScaling:
    factor = parameters.get("factor") or max_positions / original
    attention_factor = parameters.get("attention_factor")
    if "short_mscale" in parameters:
        attention_factor = parameters["short_mscale"]
        if attention_factor != parameters["long_mscale"]:
            raise UnsupportedModel("rope scaling 'longrope' with two different mscales is not supported")
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRopeScaling(
        tuple(parameters["short_factor"]), tuple(parameters["long_factor"]), original, attention_factor
    )


def head_dim(config: HFConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@dataclass(frozen=True, slots=True)
class Dims:
    """Sizes of the whole model."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    embedding_size: int | None = None  # of a token's embedding, projected to hidden_size; None: that size

    @classmethod
    def read(cls, config: HFConfig) -> "Dims":
        num_heads = config.num_attention_heads
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=num_heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
            head_dim=head_dim(config),
            max_positions=config.max_position_embeddings,
        )


@dataclass(frozen=True, slots=True)
class Norm:
    kind: Literal["rms", "layer"]
    eps: float
    has_weight: bool = True
    has_bias: bool = False
    is_offset: bool = False  # the checkpoint holds the weight minus 1


@dataclass(frozen=True, slots=True)
class Latents:
    """Keys and values out of one narrow vector a token, see models/latent_attention.py.

    For attention itself, and so in Dims, there is one KV head with kv_rank + rope_dim features.
    """

    query_rank: int | None  # queries come out of a narrow vector too; None: of the hidden states
    kv_rank: int
    plain_dim: int  # features of a head's query and key that do not turn
    rope_dim: int  # those that do: the last ones
    value_dim: int
    norm_eps: float


@dataclass(frozen=True, slots=True)
class Temperature:
    """Queries at position p are multiplied by 1 + strength x log(1 + floor((p + 1) / interval))."""

    strength: float
    interval: float  # in tokens


@dataclass(frozen=True, slots=True)
class Attention:
    qkv_bias: bool
    out_bias: bool
    rope: Rope | None  # None: positions are learned or in `alibi`
    layer_ropes: tuple[Rope | None, ...] | None = None  # per layer, in place of `rope`
    # Norms of queries and keys: over each head with one weight for all, over each head with its own weight,
    # or over the features of all heads together.
    qk_norm: Literal["per_head", "each_head", "all_heads"] | None = None
    qk_norm_bias: bool = False
    scales: tuple[float, ...] | None = None  # per layer, on query x key; None: 1 / sqrt(head_dim)
    windows: tuple[int | None, ...] | None = None  # per layer, tokens a query sees with itself; None: all
    # Per layer: tokens see those of their own stretch of so many, counted from position 0; None: all.
    stretches: tuple[int | None, ...] | None = None
    normalises_rotated: bool = False  # query and key heads are divided by their rms after a rotation
    unrotated_temperature: Temperature | None = None  # in layers that do not rotate
    softcap: float | None = None  # scores end within (-softcap, softcap): softcap x tanh(score / softcap)
    alibi: tuple[float, ...] | None = None  # per head, what a score loses for each token of distance
    clip_qkv: float | None = None  # queries, keys and values are clamped to +- this
    has_sinks: bool = False  # a learned score per head that takes part in the softmax and gives nothing
    # How one fused module orders its output features: all queries, all keys, all values; or for each KV head
    # its queries, its key, its value.
    qkv_layout: Literal["sections", "groups"] = "sections"
    # In place of QKV; `qkv_bias` is then that of the linears that lead to narrow vectors.
    latents: Latents | None = None


@dataclass(frozen=True, slots=True)
class MLP:
    intermediate_size: int
    activation: str  # transformers' name, see layers/activation.py
    is_gated: bool  # out(activation(gate(x)) * up(x)), else out(activation(in(x)))
    has_bias: bool


@dataclass(frozen=True, slots=True)
class MoE:
    """In place of the MLP of some layers: experts, each a gated MLP."""

    num_experts: int
    intermediate_size: int  # of an expert
    activation: str
    routing: Routing
    layers: tuple[bool, ...]  # per layer: has experts
    has_bias: bool = False  # in the experts and the router
    # Gates of another kind, (alpha, limit): see layers/activation.clamped_gate; gate and up alternate.
    clamped_gate: tuple[float, float] | None = None
    weighs_inputs: bool = False  # the weight of an expert is on what it reads, not on what it says
    shared_size: int | None = (
        None  # intermediate size of an expert that sees every token; None: there is none
    )
    shared_gate: bool = False  # its output is weighed by a sigmoid
    has_wide_router: bool = False  # in float32, whatever the model's dtype
    # How the checkpoint stores the experts' linears, see DecoderSpec.weight_layout.
    in_layout: Literal["out_in", "in_out"] = "out_in"
    out_layout: Literal["out_in", "in_out"] = "out_in"


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder of layers, each of which adds attention's output and the MLP's to the hidden states."""

    dims: Dims
    norm: Norm
    attention: Attention
    mlp: MLP
    names: Names
    has_tied_head: bool
    moe: MoE | None = None
    # Where a layer's norms stand: on what attention and the MLP read, on what they say, on both, or on the
    # hidden states once their outputs are added.
    norms: Literal["before", "after", "around", "of_sum"] = "before"
    # The MLP reads the hidden states after attention's output was added, or the same ones as attention: with
    # a norm of its own or with the norm of attention.
    residual: Literal["sequential", "parallel", "parallel_one_norm"] = "sequential"
    residual_scale: float = 1.0  # on what attention and the MLP add
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    head_bias: bool = False
    has_unit_head: bool = False  # the head's rows are divided by their length
    position_offset: int = 0  # the row of the learned positions that is position 0's
    # How the checkpoint stores a linear: [out, in], or the [in, out] of GPT-2's Conv1D.
    weight_layout: Literal["out_in", "in_out"] = "out_in"


def layer_windows(config: HFConfig) -> tuple[int | None, ...] | None:
    """`Attention.windows` of a config that names each layer's type."""
    if not config.sliding_window:
        return None
    return tuple(
        config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types
    )


def latent_scale(config: HFConfig, override: RopeOverride | None) -> float:
    """DeepSeek's `Attention.scales`: with yarn's factor, also for the features that do not turn."""
    scale = float((config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5)
    parameters = config.rope_parameters
    mscale = parameters.get("mscale_all_dim")
    if override is not None or parameters.get("rope_type", "default") == "default" or not mscale:
        return scale
    factor = float(parameters["factor"])
    return scale * (0.1 * mscale * math.log(factor) + 1.0) ** 2 if factor > 1 else scale


def sparse_layers(config: HFConfig) -> tuple[bool, ...]:
    """`MoE.layers` of a config that names the dense layers and a stride of the others (Qwen)."""
    return tuple(
        layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
        for layer in range(config.num_hidden_layers)
    )
