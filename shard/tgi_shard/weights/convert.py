"""PyTorch's .bin and .pt weight files -> safetensors files next to them.

Pickles are read by the restricted unpickler only (tensors and containers, no code), so this is safe for
repositories that nobody has vetted. Every file that was written is read again and compared.

Tensors that share their memory: a name that the architecture ties to another one (lm_head.weight to the
embedding) is left out, and noted in the file's metadata as `left out -> kept`; any other is written as a copy
of its own, because whoever reads the file will ask for it by name.
"""

import json
import logging
import os
import pickle
import re
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tgi_shard.model_folder import ModelError

logger = logging.getLogger(__name__)


def convert_files(sources: Sequence[Path], folder: Path, tied_patterns: Sequence[str] = ()) -> list[Path]:
    """Convert each file into `folder`; the safetensors files, in the order of `sources`.

    Writes model.safetensors.index.json as well if there are several. A file that is newer than its source is
    taken as it is. tied_patterns: regular expressions of the names that the architecture derives from other
    tensors.
    """
    weight_map: dict[str, str] = {}
    targets = []
    for i, source in enumerate(sources):
        target = folder / converted_name(source.name)
        started = time.monotonic()
        if not _is_converted(source, target):
            convert_file(source, target, tied_patterns)
        with safe_open(target, framework="pt") as written:
            weight_map |= dict.fromkeys(written.keys(), target.name)
        targets.append(target)
        logger.info(
            "Convert: [%d/%d] -- Took: %s", i + 1, len(sources), timedelta(seconds=time.monotonic() - started)
        )
    if len(targets) > 1:
        total_bytes = sum(target.stat().st_size for target in targets)
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        _write(
            folder / "model.safetensors.index.json", lambda path: path.write_text(json.dumps(index, indent=2))
        )
    return targets


def converted_name(name: str) -> str:
    """pytorch_model-00001-of-00002.bin -> model-00001-of-00002.safetensors"""
    return f"{Path(name).stem.removeprefix('pytorch_')}.safetensors"


def convert_file(source: Path, target: Path, tied_patterns: Sequence[str] = ()) -> None:
    """Write the tensors of one PyTorch file as safetensors. Raises ModelError if the file cannot be read
    safely.
    """
    tensors = _read(source)
    kept = _without_tied(tensors, tied_patterns)
    left_out = {name: keeper for name, keeper in kept.items() if name != keeper}
    output = {
        name: tensors[name].clone(memory_format=torch.contiguous_format)
        for name in kept
        if name not in left_out
    }
    _write(target, lambda path: save_file(output, path, metadata={"format": "pt", **left_out}))
    _compare(output, target)


def tied_patterns(folder: Path) -> tuple[str, ...]:
    """The names that this model's class derives from other tensors, as regular expressions; () if it ties
    none.

    () as well for a class that is not part of transformers: then every name keeps its own copy.
    """
    import transformers  # slow to import, and a folder that has safetensors never comes here

    config_fields = json.loads((folder / "config.json").read_text())
    architectures = config_fields.get("architectures") or ()
    model_class = next((getattr(transformers, name, None) for name in architectures), None)
    if model_class is None or config_fields.get("model_type") not in transformers.CONFIG_MAPPING:
        return ()
    config = transformers.AutoConfig.from_pretrained(folder)
    if not getattr(config.get_text_config(), "tie_word_embeddings", False):
        return ()
    return tuple(getattr(model_class, "_tied_weights_keys", None) or ())


def _read(source: Path) -> dict[str, Tensor]:
    try:
        # Files older than PyTorch 1.6 are no zip archives and cannot be mapped.
        content = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{source} holds Python objects other than tensors, or is damaged; loading it could run code, so "
            "it is refused. Convert it to safetensors where you trust it."
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ModelError(f"{source} is not a readable PyTorch file: {error}") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ModelError(f"{source} does not hold a dictionary of tensors.")
    foreign = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if foreign:
        raise ModelError(f"{source} holds something else than a tensor under the name {foreign[0]}.")
    return {name: value.detach() for name, value in content.items()}


def _without_tied(tensors: Mapping[str, Tensor], tied_patterns: Sequence[str]) -> dict[str, str]:
    """Name -> the name under which its values are written: its own, unless it is tied to one with the same
    memory.
    """
    same_memory: dict[tuple, list[str]] = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        # Without elements every tensor has the same address; those are kept apart by their name.
        where = tensor.data_ptr() if tensor.numel() else name
        same_memory.setdefault((where, tensor.dtype, tensor.shape, tensor.stride()), []).append(name)
    kept: dict[str, str] = {}
    for names in same_memory.values():
        own = [
            name for name in names if not any(re.fullmatch(pattern, name) for pattern in tied_patterns)
        ] or names[:1]
        kept |= {name: name if name in own else own[0] for name in names}
    return kept


def _compare(expected: Mapping[str, Tensor], target: Path) -> None:
    with safe_open(target, framework="pt") as written:
        if set(written.keys()) != set(expected):
            raise ModelError(f"The output tensors in {target} are not those of the input.")
        for name, tensor in expected.items():
            again = written.get_tensor(name)
            # As bytes, because a NaN does not equal itself.
            if (
                again.dtype != tensor.dtype
                or again.shape != tensor.shape
                or not torch.equal(_bytes(again), _bytes(tensor))
            ):
                raise ModelError(f"The output tensors do not match for key {name}")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _is_converted(source: Path, target: Path) -> bool:
    if not target.is_file() or target.stat().st_mtime < source.stat().st_mtime:
        return False
    try:
        with safe_open(target, framework="pt"):
            return True
    except SafetensorError:
        return False


def _write(target: Path, write: Callable[[Path], object]) -> None:
    """Write under another name first: a process that is stopped half-way leaves nothing that looks
    complete.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
