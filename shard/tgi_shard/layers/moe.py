"""A mixture of experts: a router chooses a few MLPs for each token and weighs what they say.

Every rank routes all tokens alike and holds a part of every expert's features; one sum over ranks makes the
output whole.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tgi_shard.distributed import Group
from tgi_shard.layers.activation import Activation
from tgi_shard.layers.linear import Linear
from tgi_shard.layers.mlp import MLP

_TILE = 64  # tokens: whole vectors, and too few for threads to share (layers/elementwise.py)

# scores of all experts [num_tokens, num_experts] -> (weights, expert ids), both [num_tokens, chosen]
Routing = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class SoftmaxTopK:
    """The likeliest experts, each with its probability. Shazeer et al. 2017, arXiv:1701.06538."""

    num_chosen: int
    is_renormalised: bool  # the chosen ones' weights sum to 1

    def __call__(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = scores.softmax(-1, dtype=torch.float32).topk(self.num_chosen, dim=-1)
        if self.is_renormalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, chosen


@dataclass(frozen=True, slots=True)
class SigmoidTopK:
    """The experts with the highest scores, each weighed by its own score's sigmoid (Llama 4, Meta 2025)."""

    num_chosen: int

    def __call__(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        best, chosen = scores.topk(self.num_chosen, dim=-1)
        return best.float().sigmoid(), chosen


@dataclass(frozen=True, slots=True)
class GroupedTopK:
    """The best experts of the best groups. DeepSeek V2 and V3, arXiv:2405.04434 and arXiv:2412.19437."""

    num_chosen: int
    is_renormalised: bool  # the chosen ones' weights sum to 1 before they are scaled
    scoring: Literal["softmax", "sigmoid"]
    scale: float  # on the weights
    num_groups: int = 1
    num_chosen_groups: int = 1
    num_judged: int = 1  # a group is as good as the sum of so many of its best experts

    def __call__(self, scores: Tensor, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """correction: [num_experts] float32, added for the choice but not to the weights."""
        scores = scores.float()
        weights = scores.softmax(-1) if self.scoring == "softmax" else scores.sigmoid()
        ranking = weights if correction is None else weights + correction
        if self.num_chosen_groups < self.num_groups:
            grouped = ranking.unflatten(-1, (self.num_groups, -1))
            merits = grouped.topk(self.num_judged, dim=-1).values.sum(-1)
            best = merits.topk(self.num_chosen_groups, dim=-1).indices
            is_out = torch.ones_like(merits, dtype=torch.bool).scatter_(-1, best, False)
            ranking = grouped.masked_fill(is_out.unsqueeze(-1), float("-inf")).flatten(-2)
        chosen = ranking.topk(self.num_chosen, dim=-1).indices
        weights = weights.gather(-1, chosen)
        if self.is_renormalised:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.scale, chosen


@dataclass(frozen=True, slots=True)
class SparseMixer:
    """The best expert and the second best, each weighed against those nearly as good, not against the other.

    Liu et al. 2024, arXiv:2409.12136, as it is at inference.
    """

    jitter: float  # "nearly": a relative distance of twice this

    def __call__(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        scores = scores.float()
        best = scores.argmax(-1, keepdim=True)
        first = self._weight(scores, scores, best)
        others = scores.scatter(-1, best, float("-inf"))
        second_best = others.argmax(-1, keepdim=True)
        second = self._weight(scores, others, second_best)
        return torch.cat((first, second), -1), torch.cat((best, second_best), -1)

    def _weight(self, scores: Tensor, candidates: Tensor, chosen: Tensor) -> Tensor:
        top = candidates.gather(-1, chosen)
        distance = (top - scores) / torch.maximum(scores.abs(), top)
        kept = candidates.masked_fill(distance > 2 * self.jitter, float("-inf"))
        return kept.softmax(-1).gather(-1, chosen)


def routed_in_tiles(routing: Routing) -> Routing:
    """The same routing in calls of one shape, so that a token's depends on its own scores alone."""

    def routed(scores: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for part in scores.split(_TILE):
            tile = part.new_zeros((_TILE, scores.shape[1]))
            tile[: len(part)] = part
            found.append(tuple(result[: len(part)] for result in routing(tile)))
        weights, chosen = zip(*found, strict=True)
        return torch.cat(weights), torch.cat(chosen)

    return routed


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """Sees every token, beside the chosen ones."""

    mlp: MLP
    gate: Linear | None  # to one feature: a sigmoid's weight for the expert's output
    sigmoid: Activation

    def __call__(self, x: Tensor) -> Tensor:
        out = self.mlp(x)
        return out if self.gate is None else out.mul_(self.sigmoid(self.gate(x)))


@dataclass(frozen=True, slots=True)
class MoE:
    router: Linear  # to one score an expert; in float32 if its weight is
    router_dtype: torch.dtype
    routing: Routing
    experts: tuple[MLP, ...]  # this rank's part of each: their sums are left to `group`
    shared: SharedExpert | None
    group: Group
    weighs_inputs: bool = False  # a weight is on what the expert reads, not on what it says

    def __call__(self, x: Tensor) -> Tensor:
        """[num_tokens, hidden] -> [num_tokens, hidden], fresh."""
        weights, chosen = self.routing(self.router(x.to(self.router_dtype)))
        out = torch.zeros_like(x) if self.shared is None else self.shared(x)
        order = chosen.flatten().argsort(stable=True)  # the tokens of an expert lie together
        token_ids = order // chosen.shape[-1]
        weights = weights.flatten().index_select(0, order).to(x.dtype).unsqueeze(-1)
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        start = 0
        for expert, count in zip(self.experts, counts, strict=True):
            if count > 0:
                part = slice(start, start + count)
                tokens = token_ids[part]
                chosen_x = x.index_select(0, tokens)
                if self.weighs_inputs:
                    said = expert(chosen_x.mul_(weights[part]))
                else:
                    said = expert(chosen_x).mul_(weights[part])
                out.index_add_(0, tokens, said)
            start += count
        return self.group.all_reduce(out)
