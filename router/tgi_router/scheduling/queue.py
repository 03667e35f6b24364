"""Sequences that wait for their turn: first come, first served; who was interrupted goes to the front."""

from collections import OrderedDict
from collections.abc import Iterator

from tgi_router.scheduling.sequence import Sequence


class WaitingQueue:
    def __init__(self) -> None:
        self._sequences: OrderedDict[int, Sequence] = OrderedDict()  # by sequence id

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.sequence_id in self._sequences

    def append(self, sequence: Sequence) -> None:
        self._sequences[sequence.sequence_id] = sequence

    def return_to_front(self, sequence: Sequence) -> None:
        self._sequences[sequence.sequence_id] = sequence
        self._sequences.move_to_end(sequence.sequence_id, last=False)

    def peek(self) -> Sequence | None:
        return next(iter(self._sequences.values()), None)

    def remove(self, sequence: Sequence) -> None:
        del self._sequences[sequence.sequence_id]

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences.values())
