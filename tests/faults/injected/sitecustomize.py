"""Imported by every Python of the server under test, through PYTHONPATH: SIGUSR1 breaks a shard's next step.

It breaks in one of the three parts of a step, at random, and once.
"""

import random
import signal
import sys
from typing import Any


def _break_next_step(*_: object) -> None:
    engine = sys.modules["tgi_shard.engine"].Engine
    part = random.choice(("forward", "sample", "finish"))
    intact = getattr(engine, part)

    def broken(*args: Any, **kwargs: Any) -> None:
        setattr(engine, part, intact)
        raise RuntimeError(f"injected into {part}")

    setattr(engine, part, broken)


signal.signal(signal.SIGUSR1, _break_next_step)
