"""What lies in a model's folder: its config, its weight files, and whether it is a kind that we serve."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

Extension = Literal[".safetensors", ".bin", ".pt"]

_DEFAULT_FILE = {".safetensors": "model.safetensors", ".bin": "pytorch_model.bin", ".pt": "pytorch_model.pt"}
INDEX = "model.safetensors.index.json"
_NUMBERED = re.compile(r"(.*)-\d+-of-(\d+)\.\w+")
_NOT_WEIGHTS = ("arguments", "args", "training")  # training_args.bin and its like


class ModelError(Exception):
    """The model as named cannot be had or served; the message tells the user what is wrong and what to do."""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            f"There is no config.json in {folder}: it is not a model in the transformers format."
        )
    return read_json_object(path)


def decoder_start_token_id(folder: Path) -> int | None:
    """What an encoder-decoder's answers begin with: from generation_config.json, else from config.json."""
    path = folder / "generation_config.json"
    for config in (read_json_object(path) if path.is_file() else {}, read_config(folder)):
        if isinstance(named := config.get("decoder_start_token_id"), int):
            return named
    return None


def refuse_unsupported(model_id: str, folder: Path) -> None:
    """Raise ModelError for repositories that hold only a part of a model. Their JSON files tell."""
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{model_id} is a PEFT adapter: merging an adapter into its base model is not available yet."
        )
    config = read_config(folder)
    if "medusa_num_heads" in config:
        raise ModelError(f"{model_id} holds Medusa heads: speculation with Medusa is not available yet.")
    if config.get("model_type") == "mlp_speculator":
        raise ModelError(f"{model_id} is an MLP speculator: speculation with an MLP is not available yet.")


def weight_names(folder: Path, names: Iterable[str], extension: Extension) -> list[str]:
    """The weight files with this extension among `names` (relative to the folder), sorted. [] for none.

    An index in the folder decides; then the name that save_pretrained gives to a single file; then all that
    look like weights, without sets (`-00001-of-00002`) of which a part is missing. So a repository that holds
    its weights twice (consolidated.safetensors) is read and downloaded once, and a conversion that was
    interrupted goes on. Raises ModelError where the index names a file that is not among `names`.
    """
    names = set(names)
    candidates = sorted(
        name
        for name in names
        if name.endswith(extension) and "/" not in name and not any(word in name for word in _NOT_WEIGHTS)
    )
    indexed = indexed_names(folder, extension) if candidates else []
    missing = [name for name in indexed if name not in names]
    if missing:
        raise ModelError(
            f"The index of the weights in {folder} names files that are missing: {', '.join(missing)}."
        )
    if indexed:
        return indexed
    default = _DEFAULT_FILE[extension]
    return [default] if default in candidates else _without_incomplete_sets(candidates)


def indexed_names(folder: Path, extension: Extension = ".safetensors") -> list[str]:
    """The weight files that the index in this folder names, sorted. [] if it has no index."""
    index = folder / f"{_DEFAULT_FILE[extension]}.index.json"
    return sorted(set(read_json_object(index)["weight_map"].values())) if index.is_file() else []


def local_names(folder: Path) -> list[str]:
    """The files of a folder, without those in sub-folders and without links to nowhere."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_file())


def local_weights(folder: Path) -> list[Path]:
    """The safetensors files of a folder; those of the first other format if there are none; or []."""
    names = local_names(folder)
    extensions: tuple[Extension, ...] = (".safetensors", ".bin", ".pt")
    for extension in extensions:
        found = weight_names(folder, names, extension)
        if found:
            return [folder / name for name in found]
    return []


def assemble(source: Path, cache_dir: Path, replaced: Iterable[Path] = ()) -> Path:
    """A writable folder with links to all that `source` holds, and to the `replaced` files in place of its
    own.

    For sources that we may not write into, or whose weights lie elsewhere. The same arguments give the same
    folder, so what was once converted into it is found again.
    """
    replaced = sorted(replaced)
    key = hashlib.sha256("\0".join(map(str, [source.resolve(), *replaced])).encode()).hexdigest()[:16]
    folder = cache_dir / ".tgi" / f"{source.name}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    targets = {entry.name: entry for entry in source.iterdir()} | {path.name: path for path in replaced}
    for name, target in targets.items():
        _link(target.resolve(), folder / name)
    return folder


def _without_incomplete_sets(names: list[str]) -> list[str]:
    numbered = {name: match.groups() for name in names if (match := _NUMBERED.fullmatch(name))}
    complete = {
        of for of in numbered.values() if sum(other == of for other in numbered.values()) == int(of[1])
    }
    return [name for name in names if name not in numbered or numbered[name] in complete]


def is_writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def _link(target: Path, link: Path) -> None:
    """Point `link` to `target`, also where it pointed elsewhere; several processes may do so at once."""
    if link.is_symlink() and link.readlink() == target:
        return
    fresh = link.with_name(f".{link.name}.{os.getpid()}")
    fresh.symlink_to(target)
    fresh.replace(link)


def read_json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} does not hold a JSON object.")
    return content
