"""A worker on a real Redis, with a fake GPU and a fake storage."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis

from consumer.keeper import Keeper
from consumer.outcomes import Outcomes, RetryPolicy
from consumer.queue import Intake, Leases, Presence, connect, connect_for_blocking_reads
from consumer.settings import ConsumerSettings
from consumer.stages import Stages
from consumer.worker import BLOCK_S, Worker
from schemas.keys import Keys
from tests.fakes import FakeArtifacts, FakeEngine, FakeFetcher
from tests.integration.queue_kit import completions


def _unchanged(reader: Redis) -> Redis:
    return reader


@dataclass
class Bench:
    """One worker with its fakes, on one Redis."""

    redis: Redis
    keys: Keys
    url: str
    engine: FakeEngine = field(default_factory=FakeEngine)
    fetcher: FakeFetcher = field(default_factory=FakeFetcher)
    artifacts: FakeArtifacts = field(default_factory=FakeArtifacts)
    wrap_reader: Callable[[Redis], Any] = _unchanged

    @asynccontextmanager
    async def worker(self, name: str = "ann", **settings: Any) -> AsyncIterator[Worker]:
        """A worker that does not run yet, with connections of its own."""
        merged = ConsumerSettings(**{"lease_s": 3, "retry_base_s": 0.01, "drain_s": 5, **settings})
        redis, reader = connect(self.url), connect_for_blocking_reads(self.url, block_s=BLOCK_S)
        leases = Leases(redis, self.keys, name, job_ttl_s=60)
        worker = Worker(
            Intake(redis, self.wrap_reader(reader), self.keys, name, lease_s=merged.lease_s),
            leases,
            Keeper(leases, Presence(redis, self.keys, name), {"gpu": "fake"}, lease_s=merged.lease_s),
            Stages(self.engine, self.fetcher, self.artifacts, leases, name, stall_s=merged.stall_s),
            Outcomes(leases, name, RetryPolicy(merged.max_attempts, merged.retry_base_s, merged.retry_cap_s)),
            merged,
        )
        try:
            yield worker
        finally:
            await redis.aclose()
            await reader.aclose()

    @asynccontextmanager
    async def working(self, name: str = "ann", **settings: Any) -> AsyncIterator[Worker]:
        async with self.worker(name, **settings) as worker:
            task = asyncio.create_task(worker.run())
            try:
                yield worker
            finally:
                if not worker.stopping:
                    worker.request_stop()
                await asyncio.wait_for(task, 20)

    async def ended(self, *job_ids: str, within_s: float = 15) -> list[dict[str, Any]]:
        """Waits for each job's terminal event; returns all events so far."""
        async with asyncio.timeout(within_s):
            while True:
                events = await completions(self.redis, self.keys)
                ended = {event["data"]["job_id"] for event in events if event["type"].split(".")[1] in _TERMINAL}
                if ended >= set(job_ids):
                    return events
                await asyncio.sleep(0.02)

    async def started(self, job_id: str = "job-1") -> None:
        """Waits until the job is drawn, and this is published."""
        async with asyncio.timeout(10):
            while "started" not in of_job(await completions(self.redis, self.keys), job_id):
                await asyncio.sleep(0.005)

    async def until(self, condition: Any, within_s: float = 10) -> None:
        async with asyncio.timeout(within_s):
            while not condition():
                await asyncio.sleep(0.005)


_TERMINAL = ("succeeded", "failed", "cancelled")


def of_job(events: list[dict[str, Any]], job_id: str) -> list[str]:
    return [event["type"].split(".")[1] for event in events if event["data"]["job_id"] == job_id]
