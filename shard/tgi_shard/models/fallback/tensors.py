"""Which tensors of a checkpoint become a parameter: by transformers' own table of renamings and conversions.

Of its conversions we do the one that most mixtures of experts need: a matrix for each expert becomes one
tensor for all, with gate and up projections one above the other.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightTransform

from tgi_shard.models.spec import UnsupportedModel
from tgi_shard.weights.loading import Weights


@dataclass(frozen=True, slots=True)
class Source:
    """The tensors that become one: a list for each pattern of a conversion, in the order of the experts."""

    groups: tuple[tuple[str, ...], ...]
    is_stacked: bool  # False: one tensor as it is

    def read(self, weights: Weights, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
        if not self.is_stacked:
            return weights.read(self.groups[0][0], shape, dtype=dtype)
        assert all(len(names) == shape[0] for names in self.groups)
        whole = torch.empty(shape, dtype=dtype or weights.dtype, device=weights.device)
        part_shape = (shape[1] // len(self.groups), *shape[2:])
        for target, names in zip(whole.split(part_shape[0], dim=1), self.groups, strict=True):
            for expert, name in enumerate(names):
                weights.read_into(target[expert], name, part_shape)
        return whole


@dataclass(slots=True)
class _Found:
    transform: WeightTransform | None
    names: dict[str, list[str]] = field(default_factory=dict)  # by the pattern that matched


def sources(model: PreTrainedModel, expected: set[str], checkpoint: Iterable[str]) -> dict[str, Source]:
    """Which of the `expected` names of the model the checkpoint has, and where. Raises UnsupportedModel."""
    transforms = get_model_conversion_mapping(model)
    found: dict[str, _Found] = {}
    for stored in checkpoint:
        name, transform, pattern = stored, None, ""
        for candidate in transforms:
            renamed, matched = candidate.rename_source_key(name)
            if matched is not None:
                name = renamed
                if isinstance(candidate, WeightConverter):
                    transform, pattern = candidate, matched
        if name not in expected and f"{model.base_model_prefix}.{name}" in expected:
            name = f"{model.base_model_prefix}.{name}"  # an export of the model without its head
        found.setdefault(name, _Found(transform)).names.setdefault(pattern, []).append(stored)
    return {name: _source(model, name, one) for name, one in found.items() if name in expected}


def _source(model: PreTrainedModel, name: str, found: _Found) -> Source:
    transform = found.transform
    if not isinstance(transform, WeightConverter):
        (stored, *_) = found.names[""]
        return Source(((stored,),), is_stacked=False)
    kinds = [(type(operation), getattr(operation, "dim", None)) for operation in transform.operations]
    if kinds not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
        raise UnsupportedModel(
            f"{model.config.model_type} stores {name} in a form that is not supported on this path"
        )
    groups = tuple(
        tuple(sorted(found.names.get(pattern, []), key=_numbers)) for pattern in transform.source_patterns
    )
    return Source(groups, is_stacked=True)


def _numbers(name: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", name)]
