"""A folder of safetensors as one mapping from names to lazy tensors: nothing is read before it is sliced."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tgi_shard.model_folder import ModelError, local_names, weight_names

_DTYPES = {  # safetensors' names
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

Rename = Callable[[str], str | None]  # a stored tensor -> what it is called here; None: it is not wanted


@dataclass(frozen=True, slots=True)
class _Place:
    file: Path
    stored: str  # the tensor's name in it


class CheckpointError(ModelError):
    """The weights on disk cannot be used; the message names the file or the tensor."""


@dataclass(slots=True)
class Checkpoint:
    """Open files and where each tensor lies. Use as a context manager: tensors are read while it is open."""

    path: Path
    rename: Rename | None = None
    _places: dict[str, _Place] = field(default_factory=dict)
    _open: dict[Path, Any] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)

    @classmethod
    def open(cls, path: Path, rename: Rename | None = None) -> "Checkpoint":
        """Raises ModelError if there are no weights, or a file is missing, cut short or not safetensors."""
        checkpoint = cls(path, rename)
        try:
            for name in weight_names(path, local_names(path), ".safetensors"):
                checkpoint._add(path / name)
            if not checkpoint._open:
                raise CheckpointError(f"There are no safetensors files in {path}.")
        except BaseException:
            checkpoint.close()
            raise
        return checkpoint

    def _add(self, file: Path) -> None:
        try:
            handle = self._stack.enter_context(safe_open(file, framework="pt", device="cpu"))
        except (SafetensorError, OSError, RuntimeError) as error:  # the last: torch cannot map the file
            raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error
        self._open[file] = handle
        for stored in handle.keys():  # noqa: SIM118  it is no mapping
            name = stored if self.rename is None else self.rename(stored)
            if name is not None:
                self._places[name] = _Place(file, stored)

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()
        self._open.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        stored = self._slice(name).get_dtype()
        if stored not in _DTYPES:
            raise CheckpointError(
                f"tensor {name} in {self._places[name].file} has dtype {stored}, which torch does not know"
            )
        return _DTYPES[stored]

    def num_bytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def read(self, name: str, ranges: dict[int, tuple[int, int]]) -> Tensor:
        """The tensor cut to [start, stop) along each axis of `ranges`.

        It may be a view of the mapped file: copy what shall outlive the file or lie aligned.
        """
        lazy = self._slice(name)
        cut = tuple(
            slice(*ranges[axis]) if axis in ranges else slice(None) for axis in range(len(lazy.get_shape()))
        )
        try:
            return lazy[cut]
        except SafetensorError as error:
            where = self._places[name].file
            raise CheckpointError(f"tensor {name} in {where} cannot be read: {error}") from error

    def _slice(self, name: str) -> Any:
        if name not in self._places:
            raise CheckpointError(f"tensor {name} is missing from the weights in {self.path}")
        place = self._places[name]
        return self._open[place.file].get_slice(place.stored)
