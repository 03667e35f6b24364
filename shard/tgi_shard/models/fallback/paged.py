"""Our paged attention as a function in transformers' attention interface."""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from tgi_shard.attention.backend import AttentionPlan

NAME = "tgi_paged"  # transformers makes no mask for an implementation that has no mask function of its name


@dataclass(frozen=True, slots=True)
class Call:
    """One call of attention in a forward pass. Each has a store of its own in the KV cache."""

    module: str  # its name in the model
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    window: int | None


@dataclass(slots=True)
class Calls:
    """The calls of a forward pass, in order, and how far the pass under way has come.

    Modules of the model hold this as `paged_calls`: transformers hands its attention functions the module.
    """

    calls: tuple[Call, ...]
    head_dim: int
    plan: AttentionPlan | None = None
    num_done: int = 0

    def begin(self, plan: AttentionPlan) -> None:
        self.plan, self.num_done = plan, 0

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """[1, heads, T, dim] each -> [1, T, heads, value_dim]."""
        assert self.plan is not None
        index = self.num_done
        self.num_done += 1
        call = self.calls[index]
        assert (query.shape[1], key.shape[1]) == (call.num_heads, call.num_kv_heads)
        key_value = key.new_empty((query.shape[2], 2, call.num_kv_heads, self.head_dim))
        for part, x in enumerate((key, value)):
            key_value[:, part] = self._widened(x)
        attended = self.plan.attend(
            index,
            self._widened(query).contiguous(),
            key_value,
            scale=call.scale,
            window=call.window,
            softcap=softcap,
            sinks=None if sinks is None else sinks.float(),
        )
        return attended.view(1, -1, call.num_heads, self.head_dim)[..., : call.value_dim]

    def _widened(self, x: Tensor) -> Tensor:
        """[1, heads, T, dim] -> [T, heads, head_dim]: zeros change neither scores nor values."""
        return F.pad(x[0], (0, self.head_dim - x.shape[-1])).transpose(0, 1)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,  # the probe has seen every argument, and noted those that matter
) -> tuple[Tensor, None]:
    calls = module.paged_calls
    assert isinstance(calls, Calls)
    return calls.attend(query, key, value, softcap, s_aux), None


AttentionInterface.register(NAME, _attend)
