"""Log-probabilities beside the chosen token's: the alternatives to it, and those of the prompt."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

NUM_SPARE = 4  # candidates fetched beyond the n-th, for ties with it
LEAST = torch.finfo(torch.float32).min  # what is below is -inf: filtered out
SLICE = 64  # rows whose log-softmax is materialised at a time


@dataclass(frozen=True, slots=True)
class TopTokens:
    """The best tokens of the rows that asked for alternatives, as they come from the device."""

    rows: list[int]  # which rows of the step these are
    counts: list[int]  # how many each asked for
    values: Tensor  # [m, k] processed scores, descending
    token_ids: Tensor  # [m, k] int64
    normalisers: Tensor  # [m]: score - normaliser = logprob
    scores: Tensor  # [m, vocab_size]: needed only if more tokens tie with the n-th than were fetched

    @classmethod
    def find(cls, scores: Tensor, normalisers: Tensor, rows: list[int], counts: list[int]) -> "TopTokens":
        """scores: [m, vocab_size] processed. counts: m numbers, at least 1."""
        best = scores.topk(min(max(counts) + NUM_SPARE, scores.shape[1]), dim=-1)
        return cls(rows, counts, best.values, best.indices, normalisers, scores)

    def moved(self, move: Callable[[Tensor], Tensor]) -> "TopTokens":
        """The same with all that `lists` always reads passed through `move`."""
        values, token_ids, normalisers = move(self.values), move(self.token_ids), move(self.normalisers)
        return replace(self, values=values, token_ids=token_ids, normalisers=normalisers)

    def lists(self) -> dict[int, list[tuple[int, float]]]:
        """For each row: (token id, logprob), best first, equal ones by id. Waits for the device.

        Ties with the n-th are all there, so there may be more than n; a token that was filtered out (-inf)
        never is.
        """
        all_values, all_token_ids = self.values.tolist(), self.token_ids.tolist()
        normalisers = self.normalisers.tolist()
        found = {}
        for i, row in enumerate(self.rows):
            values, token_ids = all_values[i], all_token_ids[i]
            edge = values[min(self.counts[i], len(values)) - 1]
            if edge == values[-1] > LEAST and len(values) < self.scores.shape[1]:
                ties = (self.scores[i] >= edge).nonzero().squeeze(1)
                values, token_ids = self.scores[i, ties].tolist(), ties.tolist()
            candidates = zip(values, token_ids, strict=True)
            kept = sorted((-value, token_id) for value, token_id in candidates if value >= max(edge, LEAST))
            found[row] = [(token_id, -negative - normalisers[i]) for negative, token_id in kept]
        return found


def token_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """The logprob of one token a row: [n] float32. logits: [n, vocab_size] raw. token_ids: [n] int64."""
    return torch.cat(
        [
            rows.log_softmax(-1).gather(1, ids.unsqueeze(1)).squeeze(1)
            for rows, ids in zip(logits.split(SLICE), token_ids.split(SLICE), strict=True)
        ]
    )
