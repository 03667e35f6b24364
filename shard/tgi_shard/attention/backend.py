"""What the decoder asks of attention: store this step's K and V, and attend a ragged batch over paged KV."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tgi_shard.kv_cache import KVCache
from tgi_shard.step import StepInputs


@dataclass(frozen=True, slots=True)
class Heads:
    """This rank's heads. num_heads is a multiple of num_kv_heads; a KV head's query heads lie together."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


class AttentionPlan(Protocol):
    """One step's batch, for every layer of it."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key_value: Tensor,
        *,
        scale: float,
        window: int | None,
        stretch: int | None = None,
        softcap: float | None = None,
        slopes: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Write K and V to their slots, then attend: [T, num_heads x head_dim], fresh.

        query: [T, num_heads, head_dim]. key_value: [T, 2, num_kv_heads, head_dim], or [T, 1, ..] if keys are
        the values too (KVShape.has_values). Both may be strided views.
        window: how many tokens a query sees, itself included; None: all up to its own.
        stretch: a query sees keys of its own stretch of so many tokens, counted from position 0; not with a
        window ("chunked attention", Llama 4).
        softcap: scores become softcap x tanh(score / softcap).
        slopes: [num_heads] float32, what a score loses for each token between query and key (ALiBi, Press et
        al. 2021, arXiv:2108.12409). sinks: [num_heads] float32, a score in each head's softmax with no value.
        """
        ...


class AttentionBackend(Protocol):
    def plan(self, inputs: StepInputs, kv_cache: KVCache) -> AttentionPlan:
        """What depends on the batch alone, once a step."""
        ...
