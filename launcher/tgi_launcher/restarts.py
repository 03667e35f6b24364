"""When a part that died may be started again."""

SECOND_DELAY_S = 0.25
MAX_DELAY_S = 30.0
HEALTHY_S = 60.0


class Restarts:
    """Counts failures in a row. Serving for `HEALTHY_S` ends the row.

    The first of a row costs no wait: streams stand still, and nothing says that it will fail again.
    """

    def __init__(self, max_restarts: int) -> None:
        self.max_restarts = max_restarts
        self.num_failures = 0

    def delay_s(self, served_s: float) -> float | None:
        """How long to wait after a failure that came `served_s` after the part was ready. None: give up."""
        if served_s >= HEALTHY_S:
            self.num_failures = 0
        self.num_failures += 1
        if self.num_failures > self.max_restarts:
            return None
        if self.num_failures == 1:
            return 0.0
        doublings = min(self.num_failures - 2, 10)  # far beyond the longest delay, and no overflow
        return float(min(MAX_DELAY_S, SECOND_DELAY_S * 2**doublings))
