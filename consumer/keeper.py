"""What this consumer holds, and keeping it: leases are renewed and life is announced at a third of the lease."""

import asyncio
import contextlib
from collections.abc import Mapping

import structlog
from redis.exceptions import RedisError

from consumer.attempt import Attempt
from consumer.errors import JobCancelled, LeaseLost
from consumer.queue import Held, Lease, Leases, Presence

log = structlog.get_logger(__name__)


def heed(attempt: Attempt, held: Held) -> None:
    """Stops the attempt where a fenced step says so. A finished picture is delivered: it is too late to cancel."""
    if held is Held.LOST:
        attempt.stop(LeaseLost())
    elif held is Held.CANCEL and attempt.stage != "delivering":
        attempt.stop(JobCancelled(attempt.stage))


class Keeper:
    """The entries in this consumer's hands, by entry id. It lives on the event loop, which GPU work never holds up."""

    def __init__(self, leases: Leases, presence: Presence, record: Mapping[str, str], *, lease_s: float) -> None:
        self.leases_held: dict[str, Lease] = {}
        self.attempts: dict[str, Attempt] = {}
        self.state = "idle"
        self._leases = leases
        self._presence = presence
        self._record = record
        self._period_s = lease_s / 3
        self._left = asyncio.Event()

    def drop(self, entry_id: str) -> None:
        """Forgets an entry that is ended, or that somebody else has to end."""
        self.leases_held.pop(entry_id, None)
        self.attempts.pop(entry_id, None)

    async def run(self) -> None:
        """Renews and announces until `leave`, and then removes this consumer from the living.

        Redis being away costs a round, never the loop.
        """
        while not self._left.is_set():
            try:
                await self._announce()
                for lease in list(self.leases_held.values()):
                    await self._renew(lease)
            except RedisError as error:
                log.warning("redis.out_of_reach", step="renew", error=type(error).__name__)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._left.wait(), self._period_s)
        try:
            await self._presence.leave()
        except RedisError as error:
            log.warning("redis.out_of_reach", step="leave", error=type(error).__name__)

    def leave(self) -> None:
        """Ends `run`. What is still held stays pending until its lease runs out."""
        self._left.set()

    async def _renew(self, lease: Lease) -> None:
        held = await self._leases.extend(lease)
        attempt = self.attempts.get(lease.delivery.entry_id)
        if attempt is not None and attempt.lease is lease:
            heed(attempt, held)

    async def _announce(self) -> None:
        running = [a.lease.job_id for a in self.attempts.values() if a.stage == "running"]
        state = "busy" if self.state == "idle" and self.attempts else self.state
        await self._presence.heartbeat({**self._record, "state": state, "job": ",".join(running)})
