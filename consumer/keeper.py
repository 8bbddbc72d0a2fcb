"""What this consumer holds, and keeping it: leases are renewed and life is announced at a third of the lease."""

import asyncio
import contextlib
from collections.abc import Coroutine, Mapping
from typing import Any

import structlog
from redis.exceptions import RedisError

from consumer.attempt import Attempt
from consumer.errors import JobCancelled, LeaseLost
from consumer.queue import Held, Lease, Leases, Place, Presence

log = structlog.get_logger(__name__)


def heed(attempt: Attempt, held: Held) -> None:
    """Stops the attempt where a fenced step says so. A finished picture is delivered: it is too late to cancel."""
    if held is Held.LOST:
        attempt.stop(LeaseLost())
    elif held is Held.CANCEL and attempt.stage != "delivering":
        attempt.stop(JobCancelled(attempt.stage))


class Keeper:
    """The entries in this consumer's hands. It lives on the event loop, which GPU work never holds up."""

    def __init__(self, leases: Leases, presence: Presence, record: Mapping[str, str], *, lease_s: float) -> None:
        self.leases_held: dict[Place, Lease] = {}
        self.attempts: dict[Place, Attempt] = {}
        self.state = "idle"
        self._leases = leases
        self._presence = presence
        self._record = record
        self._period_s = lease_s / 3
        self._left = asyncio.Event()

    def drop(self, place: Place) -> None:
        """Forgets an entry that is ended, or that somebody else has to end."""
        self.leases_held.pop(place, None)
        self.attempts.pop(place, None)

    async def run(self) -> None:
        """Renews and announces until `leave`, and then removes this consumer from the living.

        Redis being away, or refusing one thing, costs that thing a round, and nothing else.
        """
        loop = asyncio.get_running_loop()
        while not self._left.is_set():
            next_round = loop.time() + self._period_s
            renewals = [_courtesy(self._renew(lease), "renew") for lease in self.leases_held.values()]
            await asyncio.gather(*renewals, _courtesy(self._announce(), "announce"))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._left.wait(), max(0.0, next_round - loop.time()))
        await _courtesy(self._presence.leave(), "leave")

    def leave(self) -> None:
        """Ends `run`. What is still held stays pending until its lease runs out."""
        self._left.set()

    async def _renew(self, lease: Lease) -> None:
        held = await self._leases.extend(lease)
        attempt = self.attempts.get(lease.delivery.place)
        if attempt is not None and attempt.lease is lease:
            heed(attempt, held)

    async def _announce(self) -> None:
        running = [attempt.lease.job_id for attempt in self.attempts.values() if attempt.stage == "running"]
        state = "busy" if self.state == "idle" and self.attempts else self.state
        await self._presence.heartbeat({**self._record, "state": state, "job": ",".join(running)})


async def _courtesy(step: Coroutine[Any, Any, None], what: str) -> None:
    try:
        await step
    except RedisError as error:
        log.warning("redis.out_of_reach", step=what, error=type(error).__name__)
