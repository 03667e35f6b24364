"""Mamba 2 (arXiv:2405.21060): heads of channels with one decay each, B and C shared by groups of heads.

Ranks share the heads, and with them the groups; a single group's B and C are computed by every rank.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tgi_shard.distributed import SINGLE, Group
from tgi_shard.layers.activation import ACTIVATIONS
from tgi_shard.layers.causal_conv import CausalConv
from tgi_shard.layers.linear import Linear, Piece, column_parallel, row_parallel
from tgi_shard.layers.state_space_dual import Chunks, scan
from tgi_shard.models.recurrent import backbone
from tgi_shard.models.recurrent.backbone import Dims, RecurrentModel, Step, read_float
from tgi_shard.models.spec import HFConfig, UnsupportedModel
from tgi_shard.quantization.dense import Dense
from tgi_shard.state_cache import StateShape
from tgi_shard.weights.loading import Weights

MODEL_TYPES = ("mamba2",)


@dataclass(frozen=True, slots=True)
class Mamba2Spec:
    dims: Dims
    num_heads: int
    head_dim: int  # channels of a head
    num_groups: int
    state_size: int  # of a channel
    num_taps: int  # of the convolution
    activation: str
    has_bias: bool
    has_conv_bias: bool
    time_step_limit: tuple[float, float]

    @property
    def num_channels(self) -> int:
        return self.num_heads * self.head_dim

    def check(self, group: Group) -> None:
        """Raise UnsupportedModel unless the group's ranks can share the model evenly."""
        if self.num_heads % group.world_size:
            raise UnsupportedModel(
                f"the model's {self.num_heads} heads cannot be divided evenly among {group.world_size} shards"
            )
        if self.num_groups > 1 and self.num_groups % group.world_size:
            raise UnsupportedModel(
                f"the model's {self.num_groups} groups of heads cannot be divided evenly among "
                f"{group.world_size} shards"
            )

    def local_groups(self, world_size: int) -> int:
        return max(1, self.num_groups // world_size)

    def load(self, weights: Weights, group: Group) -> RecurrentModel:
        heads = self.num_heads // group.world_size
        num_selecting = self.local_groups(group.world_size) * self.state_size
        kv_shape = StateShape(
            num_layers=self.dims.num_layers,
            history=(self.num_taps - 1, heads * self.head_dim + 2 * num_selecting),
            state=(heads, self.head_dim, self.state_size),
            dtype=weights.dtype,
        )
        load_mixer = partial(_load_mixer, self, weights, group)
        return backbone.load(self.dims, kv_shape, weights, group, load_mixer, Chunks.of)


def spec(config: HFConfig) -> Mamba2Spec:
    low, high = config.time_step_limit
    return Mamba2Spec(
        dims=Dims.read(config),
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        num_groups=config.n_groups,
        state_size=config.state_size,
        num_taps=config.conv_kernel,
        activation=config.hidden_act,
        has_bias=config.use_bias,
        has_conv_bias=config.use_conv_bias,
        time_step_limit=(float(low), float(high)),
    )


@dataclass(frozen=True, slots=True)
class GatedNorm:
    """RMSNorm of x * silu(gate) over each group of channels."""

    weight: Tensor  # [channels]
    num_groups: int
    group_size: int  # channels of a whole group
    eps: float
    group: Group  # the ranks that a group of channels is spread over; SINGLE: each has whole ones

    def __call__(self, x: Tensor, gate: Tensor) -> Tensor:
        """x: [T, channels] float32. In gate's dtype."""
        x = (x * F.silu(gate.float())).unflatten(-1, (self.num_groups, -1))
        squares = self.group.all_reduce(x.square().sum(-1, keepdim=True))
        x = x * torch.rsqrt(squares / self.group_size + self.eps)
        return self.weight * x.flatten(-2).to(gate.dtype)


@dataclass(frozen=True, slots=True)
class Mamba2Mixer:
    layer: int
    inward: Linear  # hidden -> gate, what the convolution reads (x, B, C), time step
    widths: tuple[int, int, int]
    conv: CausalConv
    conv_widths: tuple[int, int, int]
    head_dim: int
    state_size: int
    time_step_bias: Tensor  # [heads] float32
    time_step_limit: tuple[float, float]
    decay: Tensor  # [heads] float32
    skip: Tensor  # [heads] float32
    norm: GatedNorm
    outward: Linear

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        assert isinstance(step.schedule, Chunks)
        gate, x, time_step = self.inward(x).split(self.widths, dim=-1)
        history, state = step.cache.read(self.layer, step.blocks, step.begins)
        x, history = self.conv(x, history, step.places)
        x, b, c = x.float().split(self.conv_widths, dim=-1)
        x = x.unflatten(-1, (-1, self.head_dim))
        b, c = (values.unflatten(-1, (-1, self.state_size)) for values in (b, c))
        time_step = F.softplus(time_step.float() + self.time_step_bias).clamp_(*self.time_step_limit)
        y = scan(x, time_step, self.decay, b, c, state, step.schedule)
        step.cache.write(self.layer, step.blocks, history, state)
        y.addcmul_(x, self.skip.unsqueeze(-1))
        return self.outward(self.norm(y.flatten(1), gate))


def _load_mixer(spec: Mamba2Spec, weights: Weights, group: Group, layer: int, prefix: str) -> Mamba2Mixer:
    world_size, rank, hidden, method = group.world_size, group.rank, spec.dims.hidden_size, Dense()
    channels, heads = spec.num_channels, spec.num_heads
    selecting = spec.num_groups * spec.state_size  # B or C of all groups
    local_heads, local_groups = heads // world_size, spec.local_groups(world_size)
    head_cut = rank * local_heads, (rank + 1) * local_heads
    cut = head_cut[0] * spec.head_dim, head_cut[1] * spec.head_dim
    first_group = rank * local_groups if spec.num_groups > 1 else 0
    group_cut = first_group * spec.state_size, (first_group + local_groups) * spec.state_size

    def shifted(part: tuple[int, int], offset: int) -> tuple[int, int]:
        return part[0] + offset, part[1] + offset

    conv_size = channels + 2 * selecting
    conv_cuts = [cut, shifted(group_cut, channels), shifted(group_cut, channels + selecting)]
    in_size = channels + conv_size + heads
    in_cuts = [cut, *(shifted(part, channels) for part in conv_cuts), shifted(head_cut, channels + conv_size)]
    local_selecting = local_groups * spec.state_size
    conv_widths = (local_heads * spec.head_dim, local_selecting, local_selecting)

    def of_conv(name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.cat([read_float(weights, f"{prefix}conv1d.{name}", shape, part) for part in conv_cuts])

    def of_heads(name: str) -> Tensor:
        return read_float(weights, prefix + name, (heads,), head_cut)

    is_spread = spec.num_groups == 1
    return Mamba2Mixer(
        layer=layer,
        inward=column_parallel(
            weights,
            method,
            [Piece(f"{prefix}in_proj", start, stop, in_size) for start, stop in in_cuts],
            hidden,
            spec.has_bias,
        ),
        widths=(conv_widths[0], sum(conv_widths), local_heads),
        conv=CausalConv(
            taps=of_conv("weight", (conv_size, 1, spec.num_taps)).squeeze(1).t().contiguous(),
            bias=of_conv("bias", (conv_size,)) if spec.has_conv_bias else None,
            activation=ACTIVATIONS[spec.activation],
        ),
        conv_widths=conv_widths,
        head_dim=spec.head_dim,
        state_size=spec.state_size,
        time_step_bias=of_heads("dt_bias"),
        time_step_limit=spec.time_step_limit,
        decay=-of_heads("A_log").exp(),
        skip=of_heads("D"),
        norm=GatedNorm(
            weight=weights.read(f"{prefix}norm.weight", (channels,), {0: cut}),
            num_groups=local_groups,
            group_size=channels // spec.num_groups,
            eps=spec.dims.norm_eps,
            group=group if is_spread else SINGLE,
        ),
        outward=row_parallel(weights, method, f"{prefix}out_proj", channels, hidden, spec.has_bias, group),
    )
