"""What the loaders of a decoder's parts share: the spec, the weights, this rank's share."""

from dataclasses import dataclass

from tgi_shard.attention.backend import Heads
from tgi_shard.distributed import Group
from tgi_shard.layers.linear import Piece
from tgi_shard.layers.norm import AnyNorm, LayerNorm, RMSNorm, WideRMSNorm
from tgi_shard.models.numerics import Numerics
from tgi_shard.models.spec import DecoderSpec
from tgi_shard.quantization.method import LinearMethod
from tgi_shard.weights.loading import Weights


@dataclass(frozen=True, slots=True)
class Part:
    spec: DecoderSpec
    weights: Weights
    group: Group
    prefix: str  # of the whole model's names
    heads: Heads  # this rank's
    numerics: Numerics
    method: LinearMethod  # of weights stored in the layout of the spec

    @property
    def is_summed(self) -> bool:
        """Whether attention's and the MLP's outputs are each summed over ranks, or by the layer together."""
        return self.spec.residual == "sequential"

    def local(self, size: int) -> tuple[int, int]:
        """This rank's range of `size` features, which the group's size must divide."""
        num_local = size // self.group.world_size
        return self.group.rank * num_local, (self.group.rank + 1) * num_local

    def norm(self, module: str) -> AnyNorm:
        norm, size = self.spec.norm, self.spec.dims.hidden_size
        weight = self.weights.read(f"{module}.weight", (size,)) if norm.has_weight else None
        if norm.kind == "layer":
            bias = self.weights.read(f"{module}.bias", (size,)) if norm.has_bias else None
            return LayerNorm(size, weight, bias, norm.eps)
        assert weight is not None
        if norm.is_offset:
            return WideRMSNorm(weight.float() + 1, norm.eps)
        return RMSNorm(weight, norm.eps)


def pieces(
    prefix: str, modules: tuple[str, ...], num_features: list[int], ranges: list[tuple[int, int]]
) -> list[Piece]:
    """Ranges of sections of sizes `num_features`: each a module of its own, or all along one module's."""
    if len(modules) == len(num_features):
        return [
            Piece(prefix + module, start, stop, total)
            for module, (start, stop), total in zip(modules, ranges, num_features, strict=True)
        ]
    (module,) = modules
    offsets = [sum(num_features[:index]) for index in range(len(num_features))]
    return [
        Piece(prefix + module, offset + start, offset + stop, sum(num_features))
        for offset, (start, stop) in zip(offsets, ranges, strict=True)
    ]
