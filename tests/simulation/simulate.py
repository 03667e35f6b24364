"""Run many schedules: python tests/simulation/simulate.py --schedules 20000"""

import argparse
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import structlog

sys.path.insert(0, str(Path(__file__).parents[1]))  # when run as a command; pytest does it by itself

from simulator import Simulation, Tally, Violation


def simulate(seeds: Iterable[int], progress_s: float | None = None) -> Counter[str]:
    """The tallies of all schedules, added up. Raises Violation, which names the schedule."""
    # The router logs each lost shard: that is most of the time, and not what is looked at here.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    total: Counter[str] = Counter()
    told_at = time.monotonic()
    for number, seed in enumerate(seeds):
        try:
            tally = Simulation(seed).run()
        except Exception as error:
            raise Violation(f"schedule {seed}: {error!r}") from error
        total.update({name: getattr(tally, name) for name in Tally.__dataclass_fields__})
        if progress_s is not None and time.monotonic() - told_at > progress_s:
            told_at = time.monotonic()
            print(f"{number + 1} schedules: {dict(total)}", flush=True)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description="Run simulated schedules of faults against the real router.")
    parser.add_argument("--schedules", type=int, default=20_000, help="how many (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="seed of the first one")
    arguments = parser.parse_args()
    began_at = time.monotonic()
    total = simulate(range(arguments.first, arguments.first + arguments.schedules), progress_s=10.0)
    print(
        f"{arguments.schedules} schedules in {time.monotonic() - began_at:.0f} s, no violation: {dict(total)}"
    )


if __name__ == "__main__":
    main()
