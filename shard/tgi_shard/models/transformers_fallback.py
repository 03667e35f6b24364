"""Decoders that have no page of ours, run by transformers' own code with our paged attention in it.

In this order, so that what cannot run is refused before a weight is read: the config; the model on the meta
device (its buffers, which follow from the config, are real); its linears cut for the ranks by its plan
(`parallel`); a probe of what it asks of attention (`probe`); then its tensors, one at a time (`tensors`).

A step's tokens are one sequence of a batch of one to the model; whose they are only our attention knows
(`paged`). So all that a layer computes across tokens must go through attention.
"""

import logging
from dataclasses import dataclass
from functools import cache, partial

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]  # it has no types
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tgi_shard.attention.backend import AttentionBackend, Heads
from tgi_shard.attention.reference import ReferenceAttention
from tgi_shard.distributed import Group
from tgi_shard.kv_cache import KVCache, KVShape
from tgi_shard.models.fallback import paged, parallel, probe, tensors
from tgi_shard.models.recipe import Recipe
from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import HFConfig, UnsupportedModel
from tgi_shard.step import StepInputs
from tgi_shard.weights.checkpoint import CheckpointError
from tgi_shard.weights.loading import Weights

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TransformersModel:
    kv_shape: KVShape
    module: PreTrainedModel
    calls: paged.Calls
    attention: AttentionBackend
    picks_logits: bool  # whether the module computes those alone that it is asked for

    def forward(self, inputs: StepInputs, kv_cache: KVCache) -> Tensor:
        self.calls.begin(self.attention.plan(inputs, kv_cache))
        arguments = {"logits_to_keep": inputs.logit_indices} if self.picks_logits else {}
        output = self.module(
            input_ids=inputs.token_ids[None],
            position_ids=inputs.positions[None],
            use_cache=False,
            **arguments,
        )
        assert self.calls.num_done == len(self.calls.calls)
        logits: Tensor = output.logits[0]
        return (logits if self.picks_logits else logits.index_select(0, inputs.logit_indices)).float()


def recipe(
    config: HFConfig, dtype: torch.dtype | None, rope_override: RopeOverride | None, trust_remote_code: bool
) -> Recipe:
    """dtype: None if nobody asks for one. Raises UnsupportedModel."""
    _check(config, rope_override)
    prepared = cache(partial(prepare, config, trust_remote_code))

    def check(group: Group) -> None:
        prepared(group, dtype or config.dtype or torch.float32)

    def load_prepared(weights: Weights, group: Group) -> TransformersModel:
        log.info("%s models have no page of ours: this one runs by transformers' own code", config.model_type)
        return load(prepared(group, weights.dtype), weights, group)

    return Recipe(
        vocab_size=config.vocab_size,
        max_positions=getattr(config, "max_position_embeddings", None) or 0,
        copies=("lm_head.weight",),
        check=check,
        load=load_prepared,
    )


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model that can run, on the meta device."""

    module: PreTrainedModel
    projections: dict[str, parallel.Projection]
    calls: tuple[paged.Call, ...]


def prepare(config: HFConfig, trust_remote_code: bool, group: Group, dtype: torch.dtype) -> Prepared:
    """Raises UnsupportedModel."""
    try:
        with init_empty_weights(include_buffers=False):
            module = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=paged.NAME, trust_remote_code=trust_remote_code
            )
    except (ValueError, ImportError) as error:
        raise UnsupportedModel(
            f"{config.model_type} is no decoder that transformers runs: {error}"
        ) from error
    if not module._supports_attention_backend or not probe.takes(module, "position_ids"):
        raise UnsupportedModel(
            f"model type {config.model_type!r} is not supported yet: its code in transformers does not let "
            "attention be replaced"
        )
    module.eval()
    projections = {}
    if group.world_size > 1:
        parallel.check_group(module, group.world_size)
        projections = parallel.cut(module, group)
    return Prepared(module, projections, probe.attention_calls(module))


def load(prepared: Prepared, weights: Weights, group: Group) -> TransformersModel:
    """Raises CheckpointError where a tensor is missing or has another shape."""
    module, calls = prepared.module, prepared.calls
    linears = {f"{name}.{part}" for name in prepared.projections for part in ("weight", "bias")}
    found = tensors.sources(module, set(module.state_dict()) | linears, weights.checkpoint)
    for name, projection in prepared.projections.items():
        stored = found.get(f"{name}.weight")
        if stored is None:
            raise _missing(f"{name}.weight")
        projection.load(weights, stored.groups[0][0].removesuffix(".weight"), group)
    _read_parameters(module, found, weights)
    _read_buffers(module, found, weights)
    head_dim = max(max(call.key_dim, call.value_dim) for call in calls)
    heads = Heads(calls[0].num_heads, calls[0].num_kv_heads, head_dim)
    running = paged.Calls(calls, head_dim)
    for name in {call.module for call in calls}:
        module.get_submodule(name).paged_calls = running  # type: ignore[assignment]
    return TransformersModel(
        kv_shape=KVShape(len(calls), heads.num_kv_heads, head_dim, weights.dtype),
        module=module,
        calls=running,
        attention=ReferenceAttention(heads),
        picks_logits=probe.takes(module, "logits_to_keep"),
    )


def _check(config: HFConfig, rope_override: RopeOverride | None) -> None:
    """What the config alone tells."""
    model_type = config.model_type
    if rope_override is not None:
        raise UnsupportedModel(f"--rope-scaling and --rope-factor are not supported for {model_type}")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"model type {model_type!r} is not supported yet: it has an encoder")
    if config.get_text_config(decoder=True) is not config:
        raise UnsupportedModel(f"model type {model_type!r} is not supported yet: it takes more than text")
    for kind in getattr(config, "layer_types", None) or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModel(f"model type {model_type!r} is not supported yet: it has {kind} layers")
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            raise UnsupportedModel(
                f"{model_type} with {parameters['rope_type']} rope is not supported: transformers turns all "
                "tokens of a batch by the longest sequence in it"
            )


def _read_parameters(module: PreTrainedModel, found: dict[str, tensors.Source], weights: Weights) -> None:
    """Replace the parameters on the meta device by those of the checkpoint, one at a time."""
    ties = dict(module.all_tied_weights_keys)
    for target, source in ties.items():  # a checkpoint may hold the pair under either name, or under both
        if source not in found and target in found:
            found[source] = found[target]
            del found[target]
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        if name in ties and name not in found:
            continue
        if name not in found:
            raise _missing(name)
        dtype = torch.float32 if _stays_float32(module, name, weights.dtype) else None
        _place(module, name, found[name].read(weights, tuple(parameter.shape), dtype))
    for target, source in ties.items():
        own, other = module.get_parameter(target), module.get_parameter(source)
        # If the checkpoint's two differ, its config is wrong to call them tied.
        if target not in found or own.is_meta or torch.equal(own, other):
            _place(module, target, other)


def _read_buffers(module: PreTrainedModel, found: dict[str, tensors.Source], weights: Weights) -> None:
    """Move to the device what follows from the config; read what the checkpoint has."""
    for name, buffer in list(module.named_buffers()):
        value = buffer.to(weights.device)
        if name in found:
            value = found[name].read(weights, tuple(buffer.shape), buffer.dtype)
        owner, _, field = name.rpartition(".")
        setattr(module.get_submodule(owner), field, value)


def _place(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, field = name.rpartition(".")
    setattr(module.get_submodule(owner), field, nn.Parameter(value, requires_grad=False))


def _stays_float32(module: PreTrainedModel, name: str, dtype: torch.dtype) -> bool:
    """Whether transformers keeps a parameter in float32 in a model of `dtype`."""
    parts = set(module._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        parts |= set(module._keep_in_fp32_modules or ())
    return any(part in name for part in parts)


def _missing(name: str) -> CheckpointError:
    return CheckpointError(f"the checkpoint has no tensor for {name}")
