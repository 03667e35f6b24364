"""What a way of storing a linear's weights must offer: its tensors, how to cut them, and a multiplication."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Tensors = dict[str, Tensor]  # part name -> this rank's tensor


@dataclass(frozen=True, slots=True)
class Part:
    name: str  # suffix in the checkpoint: "qweight", "scales"
    out_axis: int | None  # axis that follows out_features: column-parallel linears cut here
    in_axis: int | None  # axis that follows in_features: row-parallel linears cut here


class LinearMethod(Protocol):
    """A layer's bias is no part of it: layers/linear.py knows which rank adds it."""

    @property
    def parts(self) -> tuple[Part, ...]: ...  # all that layers/linear.py needs to load and cut

    def shape(self, part: Part, in_features: int, out_features: int) -> tuple[int, ...]:
        """What the checkpoint must hold for that part of a whole linear."""
        ...

    def prepare(self, tensors: Tensors) -> Tensors:
        """Once, after loading: repack, transpose. The tensors given in are let go."""
        ...

    def matmul(self, x: Tensor, tensors: Tensors, bias: Tensor | None) -> Tensor:
        """[num_tokens, in] -> [num_tokens, out], a fresh tensor in x's dtype."""
        ...
