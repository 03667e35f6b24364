"""How many generations may be under way, and when to try again for who is told that there are too many."""

import math

from tgi_router.errors import LONGEST_RETRY_S, SHORTEST_RETRY_S, Overloaded

WEIGHT_OF_LAST = 0.1  # of the generation that ended last in the mean of all


class Permits:
    """Nobody waits for one."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._num_free = count
        self._mean_held_s: float | None = None

    def take(self, count: int) -> None:
        """All or none. Raises Overloaded."""
        if count > self._num_free:
            raise Overloaded(self.retry_after_s(count))
        self._num_free -= count

    def give_back(self, count: int) -> None:
        self._num_free += count

    def observe(self, held_s: float) -> None:
        """How long a generation kept its permits."""
        if self._mean_held_s is None:
            self._mean_held_s = held_s
        self._mean_held_s += WEIGHT_OF_LAST * (held_s - self._mean_held_s)

    def retry_after_s(self, count: int) -> int:
        """Whole seconds until `count` permits should have come free: all of them do within the mean time of
        a generation, so a part of them within that part of it. The shortest while nothing is known yet.
        """
        expected_s = (self._mean_held_s or 0.0) * count / max(self._count, 1)
        return min(max(math.ceil(expected_s), SHORTEST_RETRY_S), LONGEST_RETRY_S)
