"""What a config says of a model of any kind, before a weight is read."""

from collections.abc import Callable
from dataclasses import dataclass

from tgi_shard.distributed import Group
from tgi_shard.models.model import Model
from tgi_shard.weights.loading import Weights


@dataclass(frozen=True, slots=True)
class Recipe:
    vocab_size: int
    max_positions: int  # 0: none
    head: str  # its module: a tied one may lie in the checkpoint unread
    check_group: Callable[[int], None]  # raises UnsupportedModel unless so many ranks can share the model
    load: Callable[[Weights, Group], Model]  # reads this rank's weights
