"""What a config says of a model of any kind, before a weight is read."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tgi_shard.distributed import Group
from tgi_shard.models.model import Model
from tgi_shard.weights.loading import Weights


@dataclass(frozen=True, slots=True)
class Recipe:
    vocab_size: int
    max_positions: int  # 0: none
    copies: tuple[str, ...]  # tensors that may lie in the checkpoint unread: they say nothing new
    check: Callable[[Group], None]  # raises UnsupportedModel unless its ranks can share the model
    load: Callable[[Weights, Group], Model]  # reads this rank's weights
    refused_dtypes: tuple[torch.dtype, ...] = ()
    # Of an encoder-decoder: they end every prompt, and the encoder reads what stands before them.
    decoder_start_token_ids: tuple[int, ...] = ()
