"""Penalties for tokens that were said already. All change `scores` in place and return it.

scores: [n, vocab_size] float32. token_ids: [n, length] int64; `History.padded` tells what stands in it.
"""

from torch import Tensor, where


def penalise_repetition(scores: Tensor, token_ids: Tensor, penalty: Tensor) -> Tensor:
    """Every distinct token of the row: a negative score times `penalty` [n], another divided by it.

    Keskar et al. 2019, arXiv:1909.05858. A token that stands there twice is written twice with the same
    value.
    """
    penalty = penalty.unsqueeze(1)
    seen = scores.gather(1, token_ids)
    return scores.scatter_(1, token_ids, where(seen < 0, seen * penalty, seen / penalty))


def penalise_frequency(scores: Tensor, token_ids: Tensor, counts_from: Tensor, penalty: Tensor) -> Tensor:
    """Less `penalty` [n] times the token's share of the history (TGI's). counts_from: the real tokens."""
    counts = _count(scores, token_ids, counts_from)
    per_token = penalty / counts_from.sum(1)
    return scores.sub_(counts.mul_(per_token.unsqueeze(1)))


def penalise_output(
    scores: Tensor, token_ids: Tensor, is_output: Tensor, frequency: Tensor, presence: Tensor
) -> Tensor:
    """Less `frequency` [n] times the token's count in the output, less `presence` [n] if any (OpenAI's)."""
    counts = _count(scores, token_ids, is_output)
    scores.sub_(counts.clamp(max=1).mul_(presence.unsqueeze(1)))
    return scores.sub_(counts.mul_(frequency.unsqueeze(1)))


def _count(scores: Tensor, token_ids: Tensor, counts_from: Tensor) -> Tensor:
    """How often each token of the vocabulary stands in the row: [n, vocab_size], whole numbers as float32."""
    counts = scores.new_zeros(scores.shape)
    return counts.scatter_add_(1, token_ids, counts_from.to(counts.dtype))
