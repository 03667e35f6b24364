"""The MLP of a layer: one inner linear, an activation or a gate, one outer linear."""

from dataclasses import dataclass

from torch import Tensor

from tgi_shard.layers.activation import Activation
from tgi_shard.layers.linear import Linear


@dataclass(frozen=True, slots=True)
class MLP:
    inner: Linear
    between: Activation  # from the inner linear's output to the outer one's input: a gate halves it
    out: Linear

    def __call__(self, x: Tensor) -> Tensor:
        """[num_tokens, hidden] -> [num_tokens, hidden], fresh."""
        return self.out(self.between(self.inner(x)))
