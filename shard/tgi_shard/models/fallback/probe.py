"""What a model of transformers asks of attention, found out before its weights are read.

A copy of the model on the meta device runs once. Our attention function notes each call; our mask function
hands out, in place of a mask, the rule that it would follow; a cache that knows keys and values alone betrays
layers that remember something else. Whatever paged attention cannot honour is refused here, so that at
run time nothing is ever ignored.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from tgi_shard.models.fallback.paged import Call
from tgi_shard.models.spec import UnsupportedModel

_NAME = "tgi_probe"
_NUM_TOKENS = 8

# What models hand to attention beside queries, keys, values and mask. The first are honoured; the others say
# nothing about a forward pass without dropout whose positions are those of the sequence.
_HONOURED = {"scaling", "sliding_window", "softcap", "s_aux"}
_WITHOUT_EFFECT = {
    *("dropout", "position_ids", "use_cache", "cache", "past_key_values", "logits_to_keep"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
    "position_embeddings",
}


def attention_calls(model: PreTrainedModel) -> tuple[Call, ...]:
    """The calls of attention in a forward pass, in order. Raises UnsupportedModel. `model` stays as it is."""
    probed = copy.deepcopy(model)
    nn.Module.to(probed, "meta")
    probed.config._attn_implementation = _NAME
    probe = _Probe()
    for name, module in probed.named_modules():
        module.probed = _Probed(probe, name)
        if type(module).__name__.endswith("Experts"):
            # Which tokens an expert gets depends on numbers, and there are none here.
            module.forward = _first_argument
    tokens = torch.zeros((1, _NUM_TOKENS), dtype=torch.int64, device="meta")
    cache_name = "cache" if takes(probed, "cache") else "past_key_values"
    try:
        with torch.inference_mode():
            probed(input_ids=tokens, position_ids=tokens, use_cache=False, **{cache_name: _KVCache(probe)})
    except UnsupportedModel:
        raise
    except Exception as error:  # whatever its code may raise where something is not as it expects
        raise UnsupportedModel(
            f"{model.config.model_type} cannot run on paged attention: its code fails with {error!r}"
        ) from error
    _check(model, probe)
    return tuple(probe.calls)


def takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


@dataclass
class _Probe:
    calls: list[Call] = field(default_factory=list)
    layers: set[int] = field(default_factory=set)  # those that store keys and values


@dataclass(frozen=True)
class _Probed:
    """What a module needs to note its calls."""

    probe: _Probe
    module: str


@dataclass
class _KVCache:
    """A cache of no tokens that takes keys and values; asked for anything else it raises AttributeError."""

    probe: _Probe

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.probe.layers.add(layer_idx)
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0


@dataclass(frozen=True)
class _Mask:
    """The rule by which a mask would be made: (batch, head, query's position, key's position) -> is seen."""

    rule: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    def has_window(self, window: int | None) -> bool:
        """Whether a query sees itself and what is before it, at most `window` tokens in all."""
        near = window or 1
        ends = {edge + more for edge in (0, near, 2 * near, 100_000) for more in range(-2, 3)}
        positions = torch.tensor(sorted(end for end in ends if end >= 0))
        query, key = positions[:, None], positions[None]
        zero = torch.zeros((), dtype=torch.int64)
        expected = key <= query
        if window is not None:
            expected &= key > query - window
        return torch.equal(self.rule(zero, zero, query, key).expand_as(expected), expected)


def _mask(*_: Any, mask_function: Callable[..., Tensor], **__: Any) -> _Mask:
    return _Mask(mask_function)


def _note(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **arguments: Any
) -> tuple[Tensor, None]:
    probed, config = module.probed, cast(Any, module.config)
    assert isinstance(probed, _Probed)
    model_type = config.model_type
    for argument, given in arguments.items():
        is_known = argument in _HONOURED or argument in _WITHOUT_EFFECT
        if not is_known and given is not None and not (argument == "is_causal" and given is True):
            raise UnsupportedModel(
                f"{model_type} asks attention for {argument}={given!r}, which paged attention does not know"
            )
    if not isinstance(attention_mask, _Mask):
        raise UnsupportedModel(f"{model_type} makes an attention mask of its own, which we do not know")
    windows = (arguments.get("sliding_window"), getattr(config, "sliding_window", None), None)
    fitting = [window for window in windows if attention_mask.has_window(window)]
    if not fitting:
        raise UnsupportedModel(
            f"{model_type} has an attention mask that is not causal, or more than a window"
        )
    scale = arguments.get("scaling")
    sinks = arguments.get("s_aux")
    if sinks is not None and tuple(sinks.shape) != (query.shape[1],):
        raise UnsupportedModel(f"{model_type} has attention sinks of shape {list(sinks.shape)}")
    probed.probe.calls.append(
        Call(
            module=probed.module,
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            key_dim=key.shape[-1],
            value_dim=value.shape[-1],
            scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
            window=fitting[0],
        )
    )
    return query.new_empty((1, query.shape[2], query.shape[1], value.shape[-1])), None


def _check(model: PreTrainedModel, probe: _Probe) -> None:
    model_type, num_layers = model.config.model_type, model.config.num_hidden_layers
    if len(probe.layers) != num_layers:
        raise UnsupportedModel(
            f"{model_type} keeps keys and values in {len(probe.layers)} of its {num_layers} layers: layers "
            "with another memory are not supported"
        )
    if not probe.calls:
        raise UnsupportedModel(f"{model_type} does not call attention where it could be replaced")
    shapes = {(call.num_heads, call.num_kv_heads) for call in probe.calls}
    if len(shapes) != 1:
        raise UnsupportedModel(f"{model_type} has layers with different numbers of heads: {sorted(shapes)}")


def _first_argument(hidden: Tensor, *_: object, **__: object) -> Tensor:
    return hidden


AttentionInterface.register(_NAME, _note)
AttentionMaskInterface.register(_NAME, _mask)
