"""From a checkpoint's tensors to this rank's: checked, cut, cast and placed, one at a time."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tgi_shard.weights.checkpoint import Checkpoint, CheckpointError
from tgi_shard.weights.packed import Packed, Ranges

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


@dataclass(frozen=True, slots=True)
class Excerpt:
    """One of `count` equal parts of a tensor, along its first axis: rows, or an element without that axis."""

    name: str
    index: int
    count: int


@dataclass(slots=True)
class Weights:
    """What the layers load from. A read that cannot be done raises CheckpointError with the tensor's name."""

    checkpoint: Checkpoint
    dtype: torch.dtype  # floating-point tensors become this
    device: torch.device
    progress: Progress | None = None
    excerpts: dict[str, Excerpt] = field(default_factory=dict)  # names that the checkpoint does not have
    packed: dict[str, Packed] = field(default_factory=dict)  # names of what is dequantized as it is read
    _read: set[str] = field(default_factory=set)
    _bytes_done: int = 0
    _bytes_total: int = 0

    def __post_init__(self) -> None:
        self._bytes_total = sum(self.checkpoint.num_bytes(name) for name in self.checkpoint)

    def __contains__(self, name: str) -> bool:
        return name in self.packed or self._source(name) in self.checkpoint

    def _source(self, name: str) -> str:
        excerpt = self.excerpts.get(name)
        return name if excerpt is None else excerpt.name

    def local_dtype(self, name: str) -> torch.dtype:
        """What a tensor becomes here: `self.dtype` if it is floating-point, else its own."""
        if name in self.packed or name not in self:
            return self.dtype
        stored = self.checkpoint.dtype(self._source(name))
        return self.dtype if stored.is_floating_point else stored

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        ranges: Ranges | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """This rank's cut of a tensor whose whole must have `shape`: fresh memory on the device.

        dtype: None for that of the model.
        """
        part = self._lazy(name, shape, ranges)
        target = torch.empty(part.shape, dtype=dtype or self.local_dtype(name), device=self.device)
        target.copy_(part)
        self._count(name)
        return target

    def read_into(
        self, target: Tensor, name: str, shape: tuple[int, ...], ranges: Ranges | None = None
    ) -> None:
        """The same into `target`, a view of a larger tensor: fused projections are filled part by part."""
        target.copy_(self._lazy(name, shape, ranges))
        self._count(name)

    def map(self, name: str, shape: tuple[int, ...], ranges: Ranges | None = None) -> Tensor:
        """The same, but a view of the file where dtype and device allow: for tables used by few rows."""
        part = self._lazy(name, shape, ranges).to(device=self.device, dtype=self.local_dtype(name))
        self._count(name)
        return part

    def leave_to_another_rank(self, name: str) -> None:
        self._count(name)

    def finish(self) -> list[str]:
        """Report all bytes as done; returns the names that nobody read, sorted."""
        if self.progress is not None:
            self.progress(self._bytes_total, self._bytes_total)
        return sorted(set(self.checkpoint) - self._read)

    def _lazy(self, name: str, shape: tuple[int, ...], ranges: Ranges | None) -> Tensor:
        if name in self.packed:
            return self.packed[name].read(self._stored, shape, ranges or {}, self.device)
        return self._stored(name, shape, ranges or {})

    def _stored(self, name: str, shape: tuple[int, ...], ranges: Ranges) -> Tensor:
        """As the checkpoint has it."""
        if name in self.excerpts:
            return self._excerpt(self.excerpts[name], shape, ranges)
        found = self.checkpoint.shape(name)
        if found != shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(found)}, but the config asks for {list(shape)}"
            )
        return self.checkpoint.read(name, ranges)

    def _excerpt(self, excerpt: Excerpt, shape: tuple[int, ...], ranges: Ranges) -> Tensor:
        index, count = excerpt.index, excerpt.count
        if len(self.checkpoint.shape(excerpt.name)) == len(shape):
            start, stop = ranges.get(0, (0, shape[0]))
            first = index * shape[0]
            return self._stored(
                excerpt.name, (count * shape[0], *shape[1:]), ranges | {0: (first + start, first + stop)}
            )
        inner = {axis + 1: cut for axis, cut in ranges.items()}
        return self._stored(excerpt.name, (count, *shape), inner | {0: (index, index + 1)}).squeeze(0)

    def _count(self, name: str) -> None:
        packed = self.packed.get(name)
        for stored in (name,) if packed is None else packed.sources:
            self._count_stored(self._source(stored))

    def _count_stored(self, name: str) -> None:
        if name in self._read:
            return
        self._read.add(name)
        self._bytes_done += self.checkpoint.num_bytes(name)
        if self.progress is not None:
            self.progress(self._bytes_done, self._bytes_total)
