"""How a model is computed: as fast as may be, or (`--deterministic`) so that a token's result depends on its
sequence alone, bit for bit. Chosen once, when the model is loaded; both have the same parts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tgi_shard.attention.backend import AttentionBackend, Heads
from tgi_shard.attention.deterministic import DeterministicAttention
from tgi_shard.attention.reference import ReferenceAttention
from tgi_shard.layers.activation import Activation
from tgi_shard.layers.elementwise import evenly
from tgi_shard.layers.moe import Routing, routed_in_tiles
from tgi_shard.layers.per_head import AnyPerHead, DeterministicPerHead, PerHead
from tgi_shard.quantization.dense import Dense
from tgi_shard.quantization.deterministic import DeterministicDense
from tgi_shard.quantization.method import LinearMethod

Layout = Literal["out_in", "in_out"]


@dataclass(frozen=True, slots=True)
class Numerics:
    dense: Callable[[Layout], LinearMethod]  # from how the checkpoint stores a weight
    attention: Callable[[Heads], AttentionBackend]
    per_head: Callable[[Tensor], AnyPerHead]  # from weights [heads, in, out]
    elementwise: Callable[[Activation], Activation]
    routing: Callable[[Routing], Routing]


FAST = Numerics(
    dense=Dense,
    attention=ReferenceAttention,
    per_head=PerHead,
    elementwise=lambda function: function,
    routing=lambda routing: routing,
)
DETERMINISTIC = Numerics(
    dense=DeterministicDense,
    attention=DeterministicAttention,
    per_head=DeterministicPerHead.of,
    elementwise=evenly,
    routing=routed_in_tiles,
)
