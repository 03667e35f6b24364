"""Who may have broken the shards: suspicion, quarantine, proof. Pure, like the scheduler that asks.

When the shards are lost, every sequence of the plans in flight may be the reason, and most often none is: a
process was killed, a device failed. So one loss blames nobody. A sequence that was there at a second loss,
without having got past the place where the first one caught it, is quarantined: it is tried alone, in steps
of its own, while everybody else waits. Who gets past the place is cleared. Who alone loses the shards is
tried once more, and then it is the one.

Why alone and not in halves: a trial that goes well costs a few steps, one that goes badly costs a restart.
Trying one by one needs two bad trials however many suspects there are; halving needs one for each halving.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tgi_router.scheduling.sequence import Sequence

NUM_STEPS_IN_DOUBT = 2  # plans in flight at a loss: any of them may have been the last
MIN_LOSSES_TO_TRY = 2
MIN_LOSSES_TO_FAIL = 3
MIN_LOSSES_ALONE_TO_FAIL = 2


@dataclass(slots=True)
class Suspicion:
    num_losses: int = 0
    num_losses_alone: int = 0  # of those, with nobody else in flight
    num_tokens_to_clear: int = 0  # known tokens that prove that it got past the place


class Blame:
    def __init__(self) -> None:
        self._suspicions: dict[Sequence, Suspicion] = {}

    def lost(self, in_flight: Iterable[Sequence], is_alive: Callable[[Sequence], bool]) -> Sequence | None:
        """The shards were lost while they had plans for these. The guilty one, if that is proven now.

        Those that are over by now are no suspects any more, but who was with them was not alone.
        """
        present = list(dict.fromkeys(in_flight))
        for sequence in filter(is_alive, present):
            suspicion = self._suspicions.setdefault(sequence, Suspicion())
            suspicion.num_losses += 1
            suspicion.num_losses_alone += len(present) == 1
            suspicion.num_tokens_to_clear = len(sequence.token_ids) + NUM_STEPS_IN_DOUBT
            if (
                suspicion.num_losses >= MIN_LOSSES_TO_FAIL
                and suspicion.num_losses_alone >= MIN_LOSSES_ALONE_TO_FAIL
            ):
                return sequence
        return None

    def stepped(self, sequence: Sequence) -> None:
        """A step of the sequence went well: clear it if that was far enough."""
        suspicion = self._suspicions.get(sequence)
        if suspicion is not None and len(sequence.token_ids) >= suspicion.num_tokens_to_clear:
            del self._suspicions[sequence]

    def forget(self, sequence: Sequence) -> None:
        """It is over."""
        self._suspicions.pop(sequence, None)

    @property
    def has_suspects(self) -> bool:
        return bool(self._suspicions)

    @property
    def prime_suspect(self) -> Sequence | None:
        """Who must be tried next, or goes on being tried. None: there is no quarantine."""
        return max(
            self.quarantined,
            key=lambda sequence: self._suspicions[sequence].num_losses_alone,
            default=None,
        )

    @property
    def quarantined(self) -> list[Sequence]:
        return [
            sequence
            for sequence, suspicion in self._suspicions.items()
            if suspicion.num_losses >= MIN_LOSSES_TO_TRY
        ]
