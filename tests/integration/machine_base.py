"""The machine's hands: one event loop, one Redis, and each call followed by a look at what it has done."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as ReplyLost

from consumer.queue import Intake, Leases, Place, Presence
from schemas.keys import CONSUMER_GROUP, Keys
from tests.integration.machine_checks import History, check
from tests.integration.machine_ledger import Hold, Ledger
from tests.integration.machine_world import Fault, FaultyRedis, look

T = TypeVar("T")

DATABASE = 9
AN_HOUR_MS = 3_600_000
LISTENERS = ("listeners", "audit")
NO_FAULT: Fault = (None, 0)
FAULTS: st.SearchStrategy[Fault] = st.sampled_from(
    [NO_FAULT] * 5 + [("reply", 0), ("reply", 0), ("reply", 1), ("request", 0), ("request", 1)]
)
PICKS = st.integers(0, 11)
SLOTS = st.integers(0, 2)


@dataclass(frozen=True)
class Consumer:
    """One boot of a consumer."""

    name: str
    intake: Intake
    leases: Leases
    presence: Presence


def choose(among: Sequence[T], pick: int) -> T:
    return among[pick % len(among)]


class MachineBase(RuleBasedStateMachine):
    """`url` is the Redis whose database 9 is the machine's. `tally` counts what happened, over all examples."""

    url: ClassVar[str]
    tally: ClassVar[Counter[str]]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.keys = Keys("machine")
        redis: Any = FaultyRedis.from_url(self.url, db=DATABASE)
        self.redis: FaultyRedis = redis
        self.ledger, self.history = Ledger(), History()
        self.holds: list[Hold] = []  # what consumers think they have
        self.stale: list[Hold] = []  # what they know they have no more, or slept over
        self.boots = 0
        self.known: dict[str, Consumer] = {}
        self.sound = False
        self.steps = 0
        self.runner.run(self._prepare())
        self.consumers = [self.boot() for _ in range(3)]

    async def _prepare(self) -> None:
        await self.redis.flushdb()
        for stream in self.keys.request_streams:
            await self.redis.xgroup_create(stream, CONSUMER_GROUP, id="0", mkstream=True)
        for group in LISTENERS:
            await self.redis.xgroup_create(self.keys.completions, group, id="0", mkstream=True)
        self.world = self.before = await look(self.redis, self.keys)

    def boot(self) -> Consumer:
        """A consumer under a name of its own."""
        self.boots += 1
        name = f"consumer-{self.boots}"
        self.known[name] = Consumer(
            name,
            Intake(self.redis, self.redis, self.keys, name, lease_s=30),
            Leases(self.redis, self.keys, name, job_ttl_s=60),
            Presence(self.redis, self.keys, name),
        )
        return self.known[name]

    def do(self, work: Awaitable[T], fault: Fault = NO_FAULT) -> T | None:
        """Carries out a call and looks at Redis; None where its reply, or the group, was lost."""
        self.sound = False
        return self.runner.run(self._step(work, fault))

    async def _step(self, work: Awaitable[T], fault: Fault) -> T | None:
        self.redis.begin_step(fault)
        try:
            return await work
        except ReplyLost:
            return None
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            return None
        finally:
            self.redis.lost = None
            self.before, self.world = self.world, await look(self.redis, self.keys)
            self.tally["calls"] += 1
            self.tally["calls with an effect"] += not self.unchanged

    @property
    def unchanged(self) -> bool:
        """Whether the last call has left Redis as it was."""
        return self.before.raw == self.world.raw

    @property
    def difference(self) -> list[Any]:
        """What the last call has changed, as it was and as it is."""
        before = [item for item in self.before.raw if item not in self.world.raw]
        return [before, [item for item in self.world.raw if item not in self.before.raw]]

    async def age(self, places: Sequence[Place]) -> None:
        """Lets leases run out, where they are."""
        for stream, entry_id in places:
            owner = self.world.pending[stream, entry_id].owner
            await self.redis.xclaim(stream, CONSUMER_GROUP, owner, 0, [entry_id], idle=AN_HOUR_MS, justid=True)

    async def ripen(self, job_ids: Sequence[str]) -> None:
        """Lets the time of delayed jobs come."""
        for job_id in job_ids:
            await self.redis.zincrby(self.keys.delayed, -2 * AN_HOUR_MS, job_id)

    @invariant()
    def nothing_is_lost_and_nothing_is_published_twice(self) -> None:
        check(self.world, self.ledger, self.history, self.keys)
        self.sound = True
        self.steps += 1
        self.tally["steps"] += 1

    async def _close(self) -> None:
        await self.redis.aclose()

    def teardown(self) -> None:
        self.runner.run(self._close())
        self.runner.close()
