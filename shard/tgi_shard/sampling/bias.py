"""What clients add to the raw scores of single tokens, to favour, disfavour or as good as ban them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LogitBias:
    """Of one sequence: `values[i]` is added to the score of `token_ids[i]`."""

    token_ids: np.ndarray  # int64, distinct
    values: np.ndarray  # float32

    def problem(self, vocab_size: int) -> str | None:
        """What makes it impossible to follow; None if nothing does."""
        if self.token_ids.max(initial=-1) >= vocab_size:
            return f"`logit_bias` names token id {self.token_ids.max()}, the vocabulary has {vocab_size}"
        if not np.isfinite(self.values).all():
            return "`logit_bias` must be finite"
        return None


def add_bias(scores: Tensor, biases: Sequence[LogitBias | None]) -> Tensor:
    """Add each row's bias to `scores` ([n, vocab_size] float32), in place; returns it.

    biases: [n], None for a row without one; one has one.
    """
    lengths = [0 if bias is None else len(bias.token_ids) for bias in biases]
    present = [bias for bias in biases if bias is not None]
    rows = np.repeat(np.arange(len(biases)), lengths)
    token_ids = np.concatenate([bias.token_ids for bias in present])
    places = torch.from_numpy(np.stack((rows, token_ids))).to(scores.device)
    values = torch.from_numpy(np.concatenate([bias.values for bias in present])).to(scores.device)
    return scores.index_put_((places[0], places[1]), values, accumulate=True)
