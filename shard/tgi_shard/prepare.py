"""The download step: model id -> a local folder from which router and shards can start.

In this order: find or download the repository; refuse what we cannot serve; take the weights from elsewhere
if told so; convert PyTorch weights; make tokenizer.json. What is made is written into the model's folder (for
a hub model: into its snapshot in the cache), or, where that is read-only, into a folder of links beside it in
the cache (model_folder.assemble).
"""

import logging
from pathlib import Path

from tgi_shard import fast_tokenizer, hub, model_folder
from tgi_shard.hub import Hub
from tgi_shard.model_folder import ModelError

logger = logging.getLogger(__name__)


def prepare_model(
    access: Hub,
    model_id: str,
    revision: str | None,
    *,
    trust_remote_code: bool,
    auto_convert: bool = True,
    weights_override: Path | None = None,
) -> Path:
    """The folder with config.json, tokenizer.json and safetensors files of the model. Raises ModelError.

    auto_convert: convert PyTorch weights; without it they are an error.
    weights_override: the folder that holds the weight files, if it is not the model's own
    (WEIGHTS_CACHE_OVERRIDE).
    """
    if Path(model_id).is_dir():
        folder = Path(model_id).resolve()
        model_folder.refuse_unsupported(model_id, folder)
        has_weights = bool(model_folder.local_weights(folder))
    else:
        with_weights = weights_override is None
        folder = hub.download(
            access, model_id, revision, with_code=trust_remote_code, with_weights=with_weights
        )
        has_weights = with_weights
    if not has_weights and weights_override is not None:
        folder = model_folder.assemble(folder, access.cache_dir, _weights_in(weights_override, folder))

    weights = model_folder.local_weights(folder)
    if not weights:
        raise ModelError(f"No local weights found in {model_id} with extension .safetensors")
    if weights[0].suffix != ".safetensors":
        if not auto_convert:
            raise ModelError(
                f"No .safetensors weights found for model {model_id} and revision {revision or 'main'}."
            )
        folder = _writable(folder, access)
        _convert_weights(folder, model_id, revision)
    if fast_tokenizer.is_missing(folder):
        source, folder = folder, _writable(folder, access)
        if fast_tokenizer.is_missing(folder):  # a folder of links may have it from an earlier start
            fast_tokenizer.convert(source, folder, trust_remote_code=trust_remote_code)
    return folder


def _weights_in(override: Path, folder: Path) -> list[Path]:
    """The weight files in `override`: those that the model's index names, else all that are there."""
    names = model_folder.local_names(override) if override.is_dir() else []
    indexed = model_folder.indexed_names(folder)
    for name in indexed:
        if name not in names:
            raise ModelError(f"File {name} not found in {override}.")
    found = [override / name for name in indexed] or model_folder.local_weights(override)
    if not found:
        raise ModelError(f"No weights found in {override} (WEIGHTS_CACHE_OVERRIDE).")
    index = override / model_folder.INDEX
    return [*found, index] if index.is_file() else found


def _writable(folder: Path, access: Hub) -> Path:
    if model_folder.is_writable(folder):
        return folder
    assembled = model_folder.assemble(folder, access.cache_dir)
    logger.info("%s is read-only: what is converted goes to %s.", folder, assembled)
    return assembled


def _convert_weights(folder: Path, model_id: str, revision: str | None) -> None:
    sources = model_folder.local_weights(folder)
    if sources[0].suffix == ".safetensors":  # a folder of links may have them from an earlier start
        return
    logger.warning(
        "No safetensors weights found for model %s at revision %s. "
        "Converting PyTorch weights to safetensors.",
        model_id,
        revision or "main",
    )
    from tgi_shard.weights import convert  # imports torch, which a model with safetensors need not wait for

    convert.convert_files(sources, folder, convert.tied_patterns(folder))
