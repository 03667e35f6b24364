"""Scores to tokens, for a whole step at once.

A step of plain greedy rows costs an arg-max and one softmax, whose largest value also gives the logprobs (and
which is quicker than log-sum-exp, composed of several passes in torch).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tgi_shard.sampling import random
from tgi_shard.sampling.bias import LogitBias, add_bias
from tgi_shard.sampling.grammar import AllowedTokens
from tgi_shard.sampling.history import History
from tgi_shard.sampling.logprobs import TopTokens
from tgi_shard.sampling.pipeline import process

NOT_FINITE = -1  # in place of a token, for a row whose scores are NaN, infinite, or all -inf


@dataclass(frozen=True, slots=True)
class Sampled:
    """One row a sequence, on the device."""

    token_ids: Tensor  # [n] int64; NOT_FINITE where there was nothing to choose from
    logprobs: Tensor  # [n] float32: log-softmax of the processed scores
    top_tokens: TopTokens | None  # None: no row asked


@dataclass(frozen=True, slots=True)
class Sampler:
    watermark_gamma: float = 0.5
    watermark_delta: float = 2.0

    def __call__(
        self,
        scores: Tensor,
        parameters: np.ndarray,
        history: History,
        top_n: np.ndarray,
        biases: Sequence[LogitBias | None] | None = None,
        allowed: AllowedTokens | None = None,
    ) -> Sampled:
        """Choose a token for each row. Waits for the device only if a row is watermarked.

        scores: [n, vocab_size] float32 logits; used up. parameters: [n] of `parameters.COLUMNS`.
        top_n: [n] how many alternatives to report. biases: [n]; None if no row has one.
        allowed: of the rows with a grammar; None if no row has one.
        """
        largest = scores.amax(-1)  # NaN if the row holds one
        is_finite = largest.isfinite()  # told now: a filter may hide a NaN, and would be led astray by it
        changes_scores = allowed is not None or parameters["changes_scores"].any()
        if biases is not None:
            scores = add_bias(scores, biases)
        if changes_scores:
            scores = process(scores, parameters, history, self.watermark_gamma, self.watermark_delta, allowed)
        if biases is not None or changes_scores:
            largest = scores.amax(-1)
        probabilities = scores.softmax(-1)
        token_ids = _argmax(scores)
        drawing = np.flatnonzero(parameters["do_sample"])
        if drawing.size:
            chosen = parameters[drawing]
            positions = history.num_outputs[drawing]
            uniform = random.uniforms(chosen["seed"], chosen["choice"], positions, scores.device)
            drawn = random.draw(_select(probabilities, drawing), uniform)
            token_ids = token_ids.index_copy(0, _index(drawing, scores), drawn)

        best = probabilities.amax(-1)
        normalisers = largest - best.log()  # score - normaliser = logprob
        logprobs = scores.gather(1, token_ids.unsqueeze(1)).squeeze(1) - normalisers
        top_tokens = None
        asking = np.flatnonzero(top_n)
        if asking.size:
            top_tokens = TopTokens.find(
                _select(scores, asking), _select(normalisers, asking), asking.tolist(), top_n[asking].tolist()
            )
        return Sampled(
            token_ids.masked_fill(~(is_finite & best.isfinite()), NOT_FINITE), logprobs, top_tokens
        )


def _index(rows: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(rows).to(like.device)


def _select(values: Tensor, rows: np.ndarray) -> Tensor:
    return values if rows.size == len(values) else values.index_select(0, _index(rows, values))


def _argmax(scores: Tensor) -> Tensor:
    """The first of the largest: [n] int64. On a CPU by numpy, which is ten times quicker at it."""
    if scores.device.type == "cpu":
        return torch.from_numpy(scores.numpy().argmax(-1))
    return scores.argmax(-1)
