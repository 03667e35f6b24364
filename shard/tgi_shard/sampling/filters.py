"""Filters that leave a row only some of its tokens: the scores of the others become -inf.

All change `scores` ([n, vocab_size] float32) in place and return it, keep ties at the edge, and never drop
the best token. They ask for the sorted values only, never for the order. On a CPU numpy sorts them: its
vectorised sort takes a thirtieth of the time of torch's, which carries indices along.
"""

import numpy as np
import torch
from torch import Tensor

NEGATIVE_INFINITY = float("-inf")
NUM_ALONE = 16384  # numbers: fewer than torch ever shares out among threads


def mask_top_k(scores: Tensor, top_k: np.ndarray) -> Tensor:
    """Keep the `top_k` best ([n] integers on the host, at least 1; more than there are tokens keeps all)."""
    vocab_size = scores.shape[1]
    top_k = np.minimum(top_k, vocab_size)
    if scores.device.type == "cpu":
        values = scores.numpy()
        places = vocab_size - top_k  # in ascending order
        kth = np.partition(values, np.unique(places), axis=-1)[np.arange(len(top_k)), places]
        edge = torch.from_numpy(kth).unsqueeze(1)
    else:
        best = scores.topk(int(top_k.max()), dim=-1).values
        edge = best.gather(1, torch.from_numpy(top_k - 1).to(scores.device).unsqueeze(1))
    return _keep(scores, scores >= edge)


def mask_top_p(scores: Tensor, top_p: Tensor) -> Tensor:
    """Keep the fewest tokens whose probabilities reach `top_p` ([n] float32 in (0, 1]).

    Holtzman et al. 2019, arXiv:1904.09751. As in TGI: from the rarest on, drop while the sum stays at or
    below 1 - top_p.
    """
    ascending = _sorted(scores)
    sums = ascending.softmax(-1).cumsum(-1)
    num_dropped = torch.searchsorted(sums, (1 - top_p).unsqueeze(1), right=True)
    edge = ascending.gather(1, num_dropped.clamp_(max=scores.shape[1] - 1))
    return _keep(scores, scores >= edge)


def mask_min_p(scores: Tensor, min_p: Tensor) -> Tensor:
    """Keep the tokens that are at least `min_p` ([n] float32 in (0, 1]) times as probable as the best one.

    Nguyen et al. 2024, arXiv:2407.01082.
    """
    probabilities = scores.softmax(-1)
    edge = probabilities.amax(-1, keepdim=True) * min_p.unsqueeze(1)
    return _keep(scores, probabilities >= edge)


def mask_typical(scores: Tensor, mass: Tensor) -> Tensor:
    """Keep the tokens whose surprise is nearest to the entropy, until they reach `mass` ([n] in (0, 1]).

    Meister et al. 2022, arXiv:2202.00666. The token that reaches it is kept.
    """
    logprobs = scores.log_softmax(-1)
    probabilities = logprobs.exp()
    entropy = -row_sums((probabilities * logprobs).nan_to_num_(0.0))  # 0 x -inf is 0 here
    deviation = (logprobs + entropy).abs_()
    # Non-negative floats are ordered like their bits: the pair (deviation, probability) is sorted as one
    # integer.
    pairs = _sorted((deviation.view(torch.int32).long() << 32) | probabilities.view(torch.int32).long())
    sums = (pairs & 0xFFFFFFFF).to(torch.int32).view(torch.float32).cumsum(-1)
    last = torch.searchsorted(sums, mass.unsqueeze(1)).clamp_(max=scores.shape[1] - 1)
    edge = (pairs.gather(1, last) >> 32).to(torch.int32).view(torch.float32)
    return _keep(scores, deviation <= edge)


def row_sums(values: Tensor) -> Tensor:
    """[n, columns] -> [n, 1], each row's the same alone as among others.

    Threads share a long row out if it is the only one, and then sum it in another order.
    """
    first, *others = (part.sum(-1, keepdim=True) for part in values.split(NUM_ALONE, dim=-1))
    for part in others:
        first.add_(part)
    return first


def _keep(scores: Tensor, is_kept: Tensor) -> Tensor:
    return scores.masked_fill_(is_kept.logical_not_(), NEGATIVE_INFINITY)


def _sorted(values: Tensor) -> Tensor:
    """Each row in ascending order."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return values.sort(-1).values
