"""Getting the shards back: reach the group that the launcher restarts, as often as it takes.

Nothing else is needed to resume: the router holds every sequence's tokens, the scheduler puts them all back
into the queue (`Scheduler.restart`), and the next plans add them from nothing.
"""

import asyncio
from collections.abc import Callable

import structlog

from tgi_router.shards.client import ModelFacts, ShardsLost, WarmupRefused, WarmupSizes
from tgi_router.shards.group import ShardGroup

FIRST_PAUSE_S = 0.05
MAX_PAUSE_S = 1.0
LOG_EVERY_S = 10.0

log = structlog.get_logger(__name__)


async def connect(
    group: ShardGroup, sizes: WarmupSizes, clock: Callable[[], float], *, is_start: bool
) -> ModelFacts:
    """Connect to every rank and warm it up; try again until it works.

    At the start nobody waits for an answer yet, and what the shards refuse they would refuse again: raises
    WarmupRefused. Later even that may pass, as when another process takes the memory. Who waits bounds the
    time (by cancelling).
    """
    pause_s = FIRST_PAUSE_S
    started_at = last_log_at = clock()
    while True:
        try:
            return await group.connect(sizes)
        except ShardsLost as error:
            if is_start and isinstance(error, WarmupRefused):
                raise
            if clock() - last_log_at >= LOG_EVERY_S:
                last_log_at = clock()
                log.warning("Waiting for the shards", seconds=round(clock() - started_at), reason=str(error))
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, MAX_PAUSE_S)
