"""Soft watermark: a pseudo-random part of the vocabulary, set by the last token, is made a little likelier.

Kirchenbauer et al. 2023, arXiv:2301.10226, with TGI's seed. The permutation comes from torch's CPU generator
whatever the device, so a text written on any machine can be checked on any other.
"""

import torch
from torch import Tensor

HASH_KEY = 15485863  # the millionth prime, as in the paper


def green_token_ids(last_token_id: int, vocab_size: int, gamma: float) -> Tensor:
    """The favoured tokens after `last_token_id`: [int(vocab_size * gamma)] int64 on the CPU."""
    generator = torch.Generator("cpu").manual_seed(HASH_KEY * last_token_id)
    return torch.randperm(vocab_size, generator=generator)[: int(vocab_size * gamma)]


def add_watermark(scores: Tensor, last_token_ids: list[int], gamma: float, delta: float) -> Tensor:
    """Add `delta` to the favoured tokens of each row of `scores` ([n, vocab_size]), in place; returns it."""
    vocab_size = scores.shape[1]
    green = torch.stack([green_token_ids(token_id, vocab_size, gamma) for token_id in last_token_ids])
    green = green.to(scores.device)
    return scores.scatter_add_(1, green, scores.new_full((1, 1), delta).expand(green.shape))
