"""DecoderSpec: every trait by which decoders differ, as frozen data; architectures fill it."""

from dataclasses import dataclass
from typing import Any, Literal

from tgi_shard.layers.rotary import LinearScaling, Llama3Scaling, Rope, RopeScaling, YarnScaling
from tgi_shard.model_folder import ModelError
from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.weights.names import Names

# A config object of transformers: its class knows the defaults of fields that config.json leaves away, and
# turns old spellings (rope_theta, rope_scaling, torch_dtype) into the present ones. Fields differ by family.
HFConfig = Any


class UnsupportedModel(ModelError):
    """We have no code for what the config asks for; one clear sentence that says what."""


def read_rope(config: HFConfig, override: RopeOverride | None) -> Rope:
    """Raises UnsupportedModel for a kind of scaling that we do not compute."""
    parameters = config.rope_parameters
    if "rope_theta" not in parameters:
        raise UnsupportedModel(
            f"rotary embeddings that differ by layer type are not supported for {config.model_type} models"
        )
    theta = float(parameters["rope_theta"])
    if override is not None:
        return Rope(theta, LinearScaling(override.factor))
    if parameters.get("partial_rotary_factor") not in (None, 1.0):
        raise UnsupportedModel(
            f"rotary embeddings on part of a head (partial_rotary_factor "
            f"{parameters['partial_rotary_factor']}) are not supported for {config.model_type} models"
        )
    return Rope(theta, _scaling(parameters, config.max_position_embeddings))


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
    raise UnsupportedModel(
        f"rope scaling {kind!r} is not supported yet, only 'default', 'linear', 'llama3' and 'yarn' are"
    )


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

    @classmethod
    def read(cls, config: HFConfig) -> "Dims":
        num_heads = config.num_attention_heads
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=num_heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
            max_positions=config.max_position_embeddings,
        )


@dataclass(frozen=True, slots=True)
class Norm:
    kind: Literal["rms", "layer"]  # "layer" has a bias
    eps: float


@dataclass(frozen=True, slots=True)
class Attention:
    qkv_bias: bool
    out_bias: bool
    rope: Rope | None  # None: positions are learned, see DecoderSpec
    qk_norm: Literal["per_head"] | None = None  # an RMSNorm over head_dim, one weight for all heads
    scales: tuple[float, ...] | None = None  # per layer, on query x key; None: 1 / sqrt(head_dim)
    windows: tuple[int | None, ...] | None = None  # per layer, tokens a query sees with itself; None: all


@dataclass(frozen=True, slots=True)
class MLP:
    intermediate_size: int
    activation: str  # transformers' name, see layers/activation.py
    is_gated: bool  # out(activation(gate(x)) * up(x)), else out(activation(in(x)))
    has_bias: bool


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder of layers norm -> attention -> add, norm -> MLP -> add, and a final norm."""

    dims: Dims
    norm: Norm
    attention: Attention
    mlp: MLP
    names: Names
    has_tied_head: bool
    # How the checkpoint stores a linear: [out, in], or the [in, out] of GPT-2's Conv1D.
    weight_layout: Literal["out_in", "in_out"] = "out_in"


def layer_windows(config: HFConfig) -> tuple[int | None, ...] | None:
    """`Attention.windows` of a config that names each layer's type (Qwen2, Qwen3)."""
    if config.sliding_window is None:
        return None
    return tuple(
        config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types
    )
