"""Tokens that a grammar does not allow next: their scores become -inf."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tgi_shard.plan import Masks

BIT_VALUES = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class AllowedTokens:
    """For the rows of a step that have a grammar."""

    rows: np.ndarray  # [m] int64, ascending
    bits: np.ndarray  # [m, at least vocab_size / 8] uint8, as in `Masks`

    @classmethod
    def of(cls, masks: Masks, sequence_ids: Sequence[int]) -> "AllowedTokens | None":
        """For the rows `sequence_ids` of a step; masks of others are passed over. None: no row has one."""
        mask_of = {sequence_id: index for index, sequence_id in enumerate(masks.sequence_ids)}
        rows = [row for row, sequence_id in enumerate(sequence_ids) if sequence_id in mask_of]
        if not rows:
            return None
        return cls(np.array(rows, np.int64), masks.bits[[mask_of[sequence_ids[row]] for row in rows]])


def mask_disallowed(scores: Tensor, bits: np.ndarray) -> Tensor:
    """In place. scores: [m, vocab_size] float32. bits: [m, at least vocab_size / 8] uint8, 1: allowed."""
    vocab_size = scores.shape[1]
    if scores.device.type == "cpu":
        unpacked = np.unpackbits(bits, axis=1, count=vocab_size, bitorder="little")
        allowed = torch.from_numpy(unpacked).bool()
    else:
        packed = torch.from_numpy(bits).pin_memory().to(scores.device, non_blocking=True)
        values = torch.tensor(BIT_VALUES, dtype=torch.uint8, device=scores.device)
        allowed = (packed.unsqueeze(2) & values).flatten(1)[:, :vocab_size] != 0
    return scores.masked_fill_(~allowed, float("-inf"))
