"""Rotary positions: frequencies once a model, cos and sin once a step, the rotation in every layer."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by `factor`. kaiokendev 2023; Chen et al. 2023, arXiv:2306.15595."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Long wavelengths divided by `factor`, short ones kept, a ramp between. Llama 3.1, arXiv:2407.21783."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """Interpolation by parts, and a factor on cos and sin. Peng et al. 2023, arXiv:2309.00071."""

    factor: float
    original_max_positions: int
    attention_factor: float | None  # None: from factor and the two mscales
    mscale: float | None
    mscale_all_dim: float | None
    beta_fast: float
    beta_slow: float
    truncate: bool  # round the ramp's ends to whole dimensions


@dataclass(frozen=True, slots=True)
class DynamicScaling:
    """A theta that grows with the position once it is past the trained context. bloc97, emozilla 2023.

    It depends on a token's own position alone, as in a decode, never on the length of what is processed with
    it: a key that several sequences share must be the same for all.
    """

    factor: float
    max_positions: int


@dataclass(frozen=True, slots=True)
class LongRopeScaling:
    """A divisor for each frequency: one set in the original context, another past it. arXiv:2402.13753.

    A token's own position decides which, for the reason given at DynamicScaling.
    """

    short_factors: tuple[float, ...]  # [rotary_dim / 2]
    long_factors: tuple[float, ...]
    original_max_positions: int
    attention_factor: float  # on cos and sin


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | DynamicScaling | LongRopeScaling


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions. Su et al. 2021, arXiv:2104.09864."""

    theta: float
    scaling: RopeScaling | None = None
    rotary_dim: int | None = None  # the first so many of a head's features turn; None: all
    is_interleaved: bool = False  # neighbours are paired; else the rotated part's two halves are


@dataclass(frozen=True, slots=True)
class Rotation:
    """The angles of a step's tokens, for every layer of it."""

    cos: Tensor  # [num_tokens, 1, rotary_dim]
    sin: Tensor  # [num_tokens, 1, rotary_dim], the first of each pair negated
    is_interleaved: bool

    def apply_(self, heads: Tensor) -> None:
        """In place on [num_tokens, heads, head_dim], in its dtype as transformers does."""
        rotary_dim = self.cos.shape[-1]
        if rotary_dim != heads.shape[-1]:
            heads = heads[..., :rotary_dim]
        if self.is_interleaved:
            swapped = heads.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        else:
            swapped = heads.roll(rotary_dim // 2, dims=-1)
        heads.mul_(self.cos).addcmul_(swapped, self.sin)


@dataclass(frozen=True, slots=True)
class Rotary:
    inverse_frequencies: Tensor  # [rotary_dim / 2] float32
    factor: float  # on cos and sin
    rope: Rope
    dtype: torch.dtype

    @classmethod
    def of(cls, rope: Rope, head_dim: int, dtype: torch.dtype, device: torch.device) -> "Rotary":
        frequencies, factor = inverse_frequencies(rope, head_dim)
        return cls(frequencies.to(device), factor, rope, dtype)

    def at(self, positions: Tensor) -> Rotation:
        """positions: [num_tokens] int64."""
        angles = self._angles(positions.unsqueeze(-1).float())
        cos, sin = angles.cos().mul_(self.factor), angles.sin().mul_(self.factor)
        if self.rope.is_interleaved:
            cos, sin = cos.repeat_interleave(2, dim=-1), torch.stack((-sin, sin), dim=-1).flatten(-2)
        else:
            cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return Rotation(
            cos.unsqueeze(1).to(self.dtype), sin.unsqueeze(1).to(self.dtype), self.rope.is_interleaved
        )

    def _angles(self, positions: Tensor) -> Tensor:
        """positions: [num_tokens, 1] float32 -> [num_tokens, rotary_dim / 2]."""
        angles = positions * self.inverse_frequencies
        match self.rope.scaling:
            case LongRopeScaling() as scaling:
                ratios = torch.tensor(scaling.short_factors) / torch.tensor(scaling.long_factors)
                late = angles * ratios.to(angles.device)
                return torch.where(positions >= scaling.original_max_positions, late, angles)
            case DynamicScaling() as scaling:
                num_frequencies = len(self.inverse_frequencies)
                length = (positions + 1).clamp(min=scaling.max_positions)
                growth = scaling.factor * length / scaling.max_positions - (scaling.factor - 1)
                # theta grows by growth ** (d / (d - 2)); frequency i is theta ** (-2 i / d).
                exponents = torch.arange(num_frequencies, device=angles.device) / -(num_frequencies - 1)
                return angles * growth**exponents
        return angles


def inverse_frequencies(rope: Rope, head_dim: int) -> tuple[Tensor, float]:
    """([rotary_dim / 2] float32 on the CPU, the factor on cos and sin): position 0's, if they change."""
    rotary_dim = rope.rotary_dim or head_dim
    periods = rope.theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    match rope.scaling:
        case None | DynamicScaling():
            return 1.0 / periods, 1.0
        case LongRopeScaling(short_factors):
            return 1.0 / (torch.tensor(short_factors) * periods), rope.scaling.attention_factor
        case LinearScaling(factor):
            return 1.0 / periods / factor, 1.0
        case Llama3Scaling():
            return _llama3(1.0 / periods, rope.scaling), 1.0
        case YarnScaling():
            return _yarn(periods, rope.theta, rope.scaling), _yarn_factor(rope.scaling)


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """The share of the unscaled frequency grows from 0 to 1 with the turns made in the original context."""
    num_turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    kept = (num_turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn(periods: Tensor, theta: float, scaling: YarnScaling) -> Tensor:
    """Dimensions that turn more than beta_fast times in the original context keep their frequency; those that
    turn less than beta_slow times have it divided by the factor.
    """
    head_dim = 2 * len(periods)

    def dimension(num_turns: float) -> float:
        return (
            head_dim
            * math.log(scaling.original_max_positions / (num_turns * 2 * math.pi))
            / (2 * math.log(theta))
        )

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp, without dividing by zero
    kept = 1 - ((torch.arange(len(periods), dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) / (scaling.factor * periods) + kept / periods


def _yarn_factor(scaling: YarnScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude(1.0)
