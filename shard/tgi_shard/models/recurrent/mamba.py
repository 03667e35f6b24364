"""Mamba (arXiv:2312.00752) and Falcon-Mamba (arXiv:2410.05355), which norms the step, B and C.

Ranks share the inner channels: each has a state of its own for its own. The step, B and C are functions of
all channels, so their projection is summed over ranks.
"""

from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from tgi_shard.distributed import Group
from tgi_shard.layers.activation import ACTIVATIONS
from tgi_shard.layers.causal_conv import CausalConv
from tgi_shard.layers.linear import Linear, Piece, column_parallel, row_parallel
from tgi_shard.layers.selective_scan import Schedule, selective_scan
from tgi_shard.models.recurrent import backbone
from tgi_shard.models.recurrent.backbone import Dims, RecurrentModel, Step, read_float
from tgi_shard.models.spec import HFConfig, UnsupportedModel
from tgi_shard.quantization.dense import Dense
from tgi_shard.state_cache import StateShape
from tgi_shard.weights.loading import Weights

MODEL_TYPES = ("mamba", "falcon_mamba")


@dataclass(frozen=True, slots=True)
class MambaSpec:
    dims: Dims
    num_channels: int  # inside a mixer
    state_size: int  # of a channel
    rank: int  # of the projection to time steps
    num_taps: int  # of the convolution
    activation: str
    has_bias: bool
    has_conv_bias: bool
    inner_norm_eps: float | None  # None: the step, B and C are taken as they come

    def check(self, group: Group) -> None:
        """Raise UnsupportedModel unless the group's ranks can share the model evenly."""
        if self.num_channels % group.world_size:
            raise UnsupportedModel(
                f"the model's {self.num_channels} channels cannot be divided evenly among "
                f"{group.world_size} shards"
            )

    def load(self, weights: Weights, group: Group) -> RecurrentModel:
        channels = self.num_channels // group.world_size
        kv_shape = StateShape(
            num_layers=self.dims.num_layers,
            history=(self.num_taps - 1, channels),
            state=(channels, self.state_size),
            dtype=weights.dtype,
        )
        load_mixer = partial(_load_mixer, self, weights, group)
        return backbone.load(self.dims, kv_shape, weights, group, load_mixer, Schedule.of)


def spec(config: HFConfig) -> MambaSpec:
    return MambaSpec(
        dims=Dims.read(config),
        num_channels=config.intermediate_size,
        state_size=config.state_size,
        rank=int(config.time_step_rank),
        num_taps=config.conv_kernel,
        activation=config.hidden_act,
        has_bias=config.use_bias,
        has_conv_bias=config.use_conv_bias,
        inner_norm_eps=config.mixer_rms_eps if config.model_type == "falcon_mamba" else None,
    )


@dataclass(frozen=True, slots=True)
class MambaMixer:
    layer: int
    inward: Linear  # hidden -> a channel's input and its gate
    conv: CausalConv
    select: Linear  # the channels' inputs -> time step (low rank), B, C
    widths: tuple[int, int, int]  # of those
    inner_norm_eps: float | None
    time_step: Linear  # low rank -> channels
    time_step_bias: Tensor  # [channels] float32
    decay: Tensor  # [channels, state_size] float32
    skip: Tensor  # [channels] float32
    outward: Linear

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        assert isinstance(step.schedule, Schedule)
        x, gate = self.inward(x).chunk(2, dim=-1)
        history, state = step.cache.read(self.layer, step.blocks, step.begins)
        x, history = self.conv(x, history, step.places)
        low, b, c = self.select(x).split(self.widths, dim=-1)
        if self.inner_norm_eps is not None:
            low, b, c = (F.rms_norm(part, part.shape[-1:], eps=self.inner_norm_eps) for part in (low, b, c))
        time_step = F.softplus(self.time_step(low).float() + self.time_step_bias)
        y, state = selective_scan(
            x.float(), time_step, self.decay, b.float(), c.float(), state, step.schedule
        )
        step.cache.write(self.layer, step.blocks, history, state)
        y = y.addcmul_(x.float(), self.skip).mul_(F.silu(gate))
        return self.outward(y.to(gate.dtype))


def _load_mixer(spec: MambaSpec, weights: Weights, group: Group, layer: int, prefix: str) -> MambaMixer:
    total, hidden, method = spec.num_channels, spec.dims.hidden_size, Dense()
    local = total // group.world_size
    cut = group.rank * local, (group.rank + 1) * local
    halves = [Piece(f"{prefix}in_proj", start + cut[0], start + cut[1], 2 * total) for start in (0, total)]
    taps = read_float(weights, f"{prefix}conv1d.weight", (total, 1, spec.num_taps), cut)
    widths = (spec.rank, spec.state_size, spec.state_size)
    time_step = [Piece(f"{prefix}dt_proj", *cut, total)]
    return MambaMixer(
        layer=layer,
        inward=column_parallel(weights, method, halves, hidden, spec.has_bias),
        conv=CausalConv(
            taps=taps.squeeze(1).t().contiguous(),
            bias=read_float(weights, f"{prefix}conv1d.bias", (total,), cut) if spec.has_conv_bias else None,
            activation=ACTIVATIONS[spec.activation],
        ),
        select=row_parallel(weights, method, f"{prefix}x_proj", total, sum(widths), False, group),
        widths=widths,
        inner_norm_eps=spec.inner_norm_eps,
        time_step=column_parallel(weights, method, time_step, spec.rank, has_bias=False),
        time_step_bias=read_float(weights, f"{prefix}dt_proj.bias", (total,), cut),
        decay=-read_float(weights, f"{prefix}A_log", (total, spec.state_size), cut).exp(),
        skip=read_float(weights, f"{prefix}D", (total,), cut),
        outward=row_parallel(weights, method, f"{prefix}out_proj", total, hidden, spec.has_bias, group),
    )
