"""Handing entries back at once, as far as Redis lets us; what it cannot be told, the end of the lease tells later."""

from collections.abc import Collection, Iterable

import structlog
from redis.exceptions import RedisError

from consumer.queue import Intake, Lease, Leases, Place

log = structlog.get_logger(__name__)


class HandBack:
    """What a consumer that stops does with the entries in its name."""

    def __init__(self, intake: Intake, leases: Leases) -> None:
        self._intake = intake
        self._leases = leases

    async def all(self, leases: Iterable[Lease]) -> None:
        """Releases each of them."""
        try:
            for lease in leases:
                await self._leases.release(lease)
        except RedisError as error:
            log.warning("redis.out_of_reach", step="release", error=type(error).__name__)

    async def unheld(self, held: Collection[Place]) -> None:
        """Releases what is pending under our name and in nobody's hands here, lost deliveries included."""
        try:
            unheld = await self._intake.unseen(held)
        except RedisError as error:
            log.warning("redis.out_of_reach", step="reread", error=type(error).__name__)
            return
        await self.all([Lease(delivery) for delivery in unheld])
