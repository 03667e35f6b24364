"""From a model's folder to a model that runs: which model types we have, and the steps of loading one.

The config is read and refused before any weight is touched: an unsupported model must fail in a second, not
after minutes of reading.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig

from tgi_shard import model_folder
from tgi_shard.distributed import Group
from tgi_shard.layers.activation import ACTIVATIONS
from tgi_shard.models import decoder_weights, text_part
from tgi_shard.models.architectures import (
    baichuan,
    bloom,
    cohere,
    cohere2,
    dbrx,
    deepseek_v2,
    deepseek_v3,
    exaone4,
    falcon,
    gemma,
    gemma2,
    gemma3,
    glm,
    glm4,
    gpt2,
    gpt_bigcode,
    gpt_neo,
    gpt_neox,
    gpt_oss,
    gptj,
    granite,
    granitemoe,
    llama,
    llama4_text,
    mistral,
    mixtral,
    mpt,
    olmo,
    olmo2,
    olmo3,
    olmoe,
    opt,
    phi,
    phi3,
    phimoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    smollm3,
    stablelm,
    starcoder2,
)
from tgi_shard.models.encoder_decoder import bart, t5
from tgi_shard.models.encoder_decoder import weights as encoder_decoder_weights
from tgi_shard.models.encoder_decoder.spec import EncoderDecoderSpec
from tgi_shard.models.model import Model
from tgi_shard.models.numerics import DETERMINISTIC, FAST, Numerics
from tgi_shard.models.recipe import Recipe
from tgi_shard.models.recurrent import backbone, mamba, mamba2
from tgi_shard.models.rope_override import RopeOverride
from tgi_shard.models.spec import DecoderSpec, HFConfig, UnsupportedModel
from tgi_shard.weights import block_fp8
from tgi_shard.weights.checkpoint import Checkpoint, Rename
from tgi_shard.weights.loading import Weights
from tgi_shard.weights.packed import Packed

__all__ = ["LoadedModel", "Model", "RopeOverride", "UnsupportedModel", "load_model"]

log = logging.getLogger(__name__)

_ARCHITECTURES: tuple[ModuleType, ...] = (
    *(llama, llama4_text, mistral, mixtral, qwen2, qwen2_moe, qwen3, qwen3_moe),
    *(gemma, gemma2, gemma3, phi, phi3, phimoe, cohere, cohere2),
    *(falcon, starcoder2, gpt_bigcode, gpt2, gptj, gpt_neo, gpt_neox, gpt_oss, bloom, mpt, opt),
    *(baichuan, stablelm, olmo, olmo2, olmo3, olmoe, granite, granitemoe, smollm3, glm, glm4, exaone4, dbrx),
    *(deepseek_v2, deepseek_v3),
)
BY_MODEL_TYPE = {model_type: module for module in _ARCHITECTURES for model_type in module.MODEL_TYPES}
ENCODER_DECODERS = {model_type: module for module in (t5, bart) for model_type in module.MODEL_TYPES}
RECURRENT = {model_type: module for module in (mamba, mamba2) for model_type in module.MODEL_TYPES}
# All others run through transformers, if they can.
_OURS = BY_MODEL_TYPE | ENCODER_DECODERS | RECURRENT

# Buffers that old exports wrote beside the weights: masks, and frequencies that follow from the config.
_NO_WEIGHTS = re.compile(r"\.(attn|attention)\.(masked_)?bias$|\.rotary_emb\.inv_freq$")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: Model
    model_type: str
    vocab_size: int
    max_position_embeddings: int  # 0: none
    dtype: torch.dtype
    # Of an encoder-decoder: they end every prompt, and the encoder reads what stands before them.
    decoder_start_token_ids: tuple[int, ...] = ()


def load_model(
    model_path: Path,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    group: Group,
    rope_override: RopeOverride | None = None,
    trust_remote_code: bool = False,
    through_transformers: bool = False,
    deterministic: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedModel:
    """Read this rank's part of the model in `model_path`.

    dtype: None for the checkpoint's own. through_transformers: also a model that has a page of ours, to hold
    the two ways against one another. deterministic: see models/numerics.py; `group` sums in order then.
    progress(bytes_done, bytes_total) is called as tensors are read.
    Raises UnsupportedModel before any weight is read, CheckpointError where the weights are not what the
    config says; both are ModelErrors.
    """
    whole = _read_config(model_path, trust_remote_code)
    config, rename = _text_part(whole)
    if rename is not None:
        log.info("The text model (%s) alone is served; images are not available yet", config.model_type)
    _check_quantization(config)
    if deterministic and (through_transformers or config.model_type not in BY_MODEL_TYPE):
        raise UnsupportedModel(_not_deterministic(config.model_type))
    if through_transformers or config.model_type not in _OURS:
        # Imported here: transformers' modeling code takes seconds that models of ours need not spend.
        from tgi_shard.models import transformers_fallback

        recipe = transformers_fallback.recipe(config, dtype, rope_override, trust_remote_code)
    else:
        recipe = _recipe(model_path, config, rope_override, DETERMINISTIC if deterministic else FAST)
    recipe.check(group)
    with Checkpoint.open(model_path, rename) as checkpoint:
        chosen = _dtype(dtype, config, checkpoint)
        if chosen in recipe.refused_dtypes:
            raise UnsupportedModel(
                f"{config.model_type} models leave the range of {str(chosen).removeprefix('torch.')}; "
                "use bfloat16 or float32"
            )
        weights = Weights(checkpoint, chosen, device, progress, packed=_packed(config, checkpoint))
        model = recipe.load(weights, group)
        _warn_of_unread(weights, recipe.copies)
    return LoadedModel(
        model,
        whole.model_type,
        recipe.vocab_size,
        recipe.max_positions,
        chosen,
        recipe.decoder_start_token_ids,
    )


def _warn_of_unread(weights: Weights, copies: tuple[str, ...]) -> None:
    """Once all is read."""
    unread = [name for name in weights.finish() if name not in copies and not _NO_WEIGHTS.search(name)]
    if unread:
        log.warning("%d tensors of the checkpoint are not used: %s ...", len(unread), ", ".join(unread[:8]))


def import_for(model_path: Path) -> None:
    """Import what `load_model` takes for this model, and read nothing but its config. Raises ModelError."""
    config, _ = _text_part(_read_config(model_path, trust_remote_code=False))
    if config.model_type not in _OURS:
        from tgi_shard.models import transformers_fallback  # noqa: F401


def _text_part(whole: HFConfig) -> tuple[HFConfig, Rename | None]:
    """The config of what is served; if that is a part, what its tensors are called."""
    if whole.model_type in text_part.MODEL_TYPES:
        return text_part.config(whole), text_part.name
    return whole, None


def _read_config(model_path: Path, trust_remote_code: bool) -> HFConfig:
    raw = model_folder.read_config(model_path)
    model_type = raw.get("model_type")
    if model_type not in _OURS and model_type not in CONFIG_MAPPING:
        if "auto_map" not in raw:
            raise UnsupportedModel(f"model type {model_type!r} is not supported yet: transformers has none")
        if not trust_remote_code:
            raise UnsupportedModel(
                f"model type {model_type!r} comes with code of its own, which runs with "
                "--trust-remote-code only"
            )
    try:
        return AutoConfig.from_pretrained(
            model_path,
            local_files_only=True,
            # Code that comes with a model that we or transformers know is not needed, and not run.
            trust_remote_code=trust_remote_code and model_type not in _OURS,
        )
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise UnsupportedModel(
            f"config.json in {model_path} is no valid {model_type} config: {error}"
        ) from error


def _check_quantization(config: HFConfig) -> None:
    """Raises UnsupportedModel."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    method, model_type = quantization.get("quant_method"), config.model_type
    by_default = ("fp8",) if model_type in BY_MODEL_TYPE else ()
    if method not in getattr(_OURS.get(model_type), "QUANTIZATIONS", by_default):
        raise UnsupportedModel(
            f"checkpoints quantized with {method!r} are not supported yet for {model_type} models"
        )
    if method == "fp8" and not quantization.get("weight_block_size"):
        raise UnsupportedModel("fp8 checkpoints without a weight_block_size are not supported yet")


def _packed(config: HFConfig, checkpoint: Checkpoint) -> dict[str, Packed]:
    """What is stored in another form wherever it stands; other forms are told by the names of a family."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None or quantization["quant_method"] != "fp8":
        return {}
    found = block_fp8.find(checkpoint, tuple(quantization["weight_block_size"]))
    log.info("%d weights are stored in fp8: they are dequantized as they are read", len(found))
    return {**found}


def _not_deterministic(model_type: str) -> str:
    kind = "run by transformers' own code"
    if model_type in ENCODER_DECODERS:
        kind = "have an encoder"
    elif model_type in RECURRENT:
        kind = "are recurrent"
    return f"--deterministic is not available for {model_type} models, which {kind}; start without it"


def _recipe(
    model_path: Path, config: HFConfig, rope_override: RopeOverride | None, numerics: Numerics
) -> Recipe:
    if config.model_type in RECURRENT:
        return _recurrent(config, rope_override)
    if config.model_type in ENCODER_DECODERS:
        return _encoder_decoder(model_path, config, rope_override)
    spec = _spec(config, rope_override)
    return Recipe(
        vocab_size=spec.dims.vocab_size,
        max_positions=spec.dims.max_positions,
        copies=(f"{spec.names.head}.weight",),
        check=partial(decoder_weights.check, spec),
        load=partial(decoder_weights.load, spec, numerics),
    )


def _recurrent(config: HFConfig, rope_override: RopeOverride | None) -> Recipe:
    if rope_override is not None:
        raise UnsupportedModel(f"{config.model_type} has no rotary positions that could be scaled")
    if config.hidden_act not in ACTIVATIONS:
        raise UnsupportedModel(f"activation {config.hidden_act!r} is not supported")
    spec = RECURRENT[config.model_type].spec(config)
    return Recipe(
        vocab_size=config.vocab_size,
        max_positions=0,
        copies=(f"{backbone.HEAD}.weight",),
        check=spec.check,
        load=spec.load,
    )


def _encoder_decoder(model_path: Path, config: HFConfig, rope_override: RopeOverride | None) -> Recipe:
    spec: EncoderDecoderSpec = ENCODER_DECODERS[config.model_type].spec(config, rope_override)
    start_token_id = model_folder.decoder_start_token_id(model_path)
    if start_token_id is None:
        raise UnsupportedModel(
            f"neither generation_config.json nor config.json in {model_path} names a decoder_start_token_id"
        )
    return Recipe(
        vocab_size=spec.vocab_size,
        max_positions=spec.max_positions,
        copies=encoder_decoder_weights.COPIES,
        check=partial(encoder_decoder_weights.check, spec),
        load=partial(encoder_decoder_weights.load, spec, 1),
        refused_dtypes=(torch.float16,) if spec.overflows_float16 else (),
        decoder_start_token_ids=(start_token_id,),
    )


def _spec(config: HFConfig, rope_override: RopeOverride | None) -> DecoderSpec:
    spec: DecoderSpec = BY_MODEL_TYPE[config.model_type].spec(config, rope_override)
    for activation in (spec.mlp.activation, *([] if spec.moe is None else [spec.moe.activation])):
        if activation not in ACTIVATIONS:
            raise UnsupportedModel(f"activation {activation!r} is not supported")
    return spec


def _dtype(asked: torch.dtype | None, config: HFConfig, checkpoint: Checkpoint) -> torch.dtype:
    """What is asked for, else what the config names, else what most of the checkpoint is."""
    chosen = asked or config.dtype
    if chosen is None:
        stored = [checkpoint.dtype(name) for name in checkpoint]
        plain = [dtype for dtype in stored if dtype in _DTYPES] or stored
        chosen = max(set(plain), key=plain.count)
    if chosen not in _DTYPES:
        raise UnsupportedModel(f"dtype {chosen} is not supported; use float32, bfloat16 or float16")
    return chosen
