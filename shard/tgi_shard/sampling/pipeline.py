"""The processors of scores in TGI's order, and which rows use which.

Watermark, repetition penalty, frequency penalties, grammar, temperature, top-k, top-p, min-p (which TGI
lacks; transformers has it here), typical-p. A processor sees only the rows that use it; the others neither
pay for it nor pass through neutral values. What a client adds to single scores was added before: see bias.py.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tgi_shard.sampling.filters import mask_min_p, mask_top_k, mask_top_p, mask_typical
from tgi_shard.sampling.grammar import AllowedTokens, mask_disallowed
from tgi_shard.sampling.history import History
from tgi_shard.sampling.penalties import penalise_frequency, penalise_output, penalise_repetition
from tgi_shard.sampling.watermark import add_watermark

# (scores of the rows that use it, their parameters, their histories) -> scores; may change them in place
Processor = Callable[[Tensor, np.ndarray, History], Tensor]


def process(
    scores: Tensor,
    parameters: np.ndarray,
    history: History,
    gamma: float,
    delta: float,
    allowed: AllowedTokens | None = None,
) -> Tensor:
    """All processors over all rows; `scores` ([n, vocab_size] float32) is used up.

    parameters: [n] of `parameters.COLUMNS`. gamma, delta: the watermark's share of the vocabulary and its
    bonus. allowed: None if no row has a grammar.
    """

    def watermark(scores: Tensor, parameters: np.ndarray, history: History) -> Tensor:
        return add_watermark(scores, history.last_token_ids(), gamma, delta)

    def grammar(scores: Tensor, parameters: np.ndarray, history: History) -> Tensor:
        assert allowed is not None
        return mask_disallowed(scores, allowed.bits)

    has_grammar = np.zeros(len(parameters), np.bool_)
    if allowed is not None:
        has_grammar[allowed.rows] = True
    of_count, of_presence = parameters["output_frequency_penalty"], parameters["output_presence_penalty"]
    stages: list[tuple[np.ndarray, Processor]] = [
        (parameters["watermark"], watermark),
        (parameters["repetition_penalty"] != 1, _repetition),
        (parameters["frequency_penalty"] != 0, _frequency),
        ((of_count != 0) | (of_presence != 0), _output),
        (has_grammar, grammar),
        (parameters["temperature"] != 1, _temperature),
        (parameters["top_k"] > 0, _top_k),
        (parameters["top_p"] < 1, _top_p),
        (parameters["min_p"] > 0, _min_p),
        (parameters["typical_p"] < 1, _typical),
    ]
    for is_active, processor in stages:
        if is_active.all():
            scores = processor(scores, parameters, history)
        elif is_active.any():
            rows = np.flatnonzero(is_active)
            index = torch.from_numpy(rows).to(scores.device)
            part = processor(scores.index_select(0, index), parameters[rows], history.select(rows))
            scores.index_copy_(0, index, part)
    return scores


def _repetition(scores: Tensor, parameters: np.ndarray, history: History) -> Tensor:
    token_ids, _, _ = history.padded()
    return penalise_repetition(scores, token_ids, _column(parameters, "repetition_penalty", scores))


def _frequency(scores: Tensor, parameters: np.ndarray, history: History) -> Tensor:
    token_ids, is_real, _ = history.padded()
    return penalise_frequency(scores, token_ids, is_real, _column(parameters, "frequency_penalty", scores))


def _output(scores: Tensor, parameters: np.ndarray, history: History) -> Tensor:
    token_ids, _, is_output = history.padded()
    frequency = _column(parameters, "output_frequency_penalty", scores)
    presence = _column(parameters, "output_presence_penalty", scores)
    return penalise_output(scores, token_ids, is_output, frequency, presence)


def _temperature(scores: Tensor, parameters: np.ndarray, history: History) -> Tensor:
    return scores.div_(_column(parameters, "temperature", scores).unsqueeze(1))


def _top_k(scores: Tensor, parameters: np.ndarray, history: History) -> Tensor:
    return mask_top_k(scores, parameters["top_k"])


def _top_p(scores: Tensor, parameters: np.ndarray, history: History) -> Tensor:
    return mask_top_p(scores, _column(parameters, "top_p", scores))


def _min_p(scores: Tensor, parameters: np.ndarray, history: History) -> Tensor:
    return mask_min_p(scores, _column(parameters, "min_p", scores))


def _typical(scores: Tensor, parameters: np.ndarray, history: History) -> Tensor:
    return mask_typical(scores, _column(parameters, "typical_p", scores))


def _column(parameters: np.ndarray, name: str, like: Tensor) -> Tensor:
    return torch.from_numpy(parameters[name].copy()).to(like.device)
