"""What the client's tests share: a client of a queue of their own, and consumers that end its jobs."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from redis.asyncio import Redis

from consumer.queue import Delivery, Lease
from producer.client import AsyncGenerationClient
from producer.storage import PresignedUrls
from producer.submissions import QueueLimits
from schemas.entries import decode_entry
from schemas.errors import ErrorCode
from schemas.events import FailedEvent, SucceededEvent
from schemas.keys import JobState, Keys
from tests import event_kit
from tests.integration.queue_kit import FakeConsumer

T = TypeVar("T")
PATIENCE_S = 20.0
CANARY = "X-Amz-Signature=canary"
FOREIGN_URL = "https://files.example/cat.safetensors"
STORAGE = PresignedUrls(
    endpoint_url="https://account.r2.example", bucket="pictures", access_key_id="id", secret_access_key="secret"
)


def a_client(
    url: str, keys: Keys, *, max_queue: int = 1000, per_tenant: int = 0, completions: int = 0, **options: Any
) -> AsyncGenerationClient:
    limits = QueueLimits(max_queue, per_tenant, completions)
    return AsyncGenerationClient(url, prefix=keys.prefix, limits=limits, **{"job_ttl_s": 60, **options})


@asynccontextmanager
async def a_redis(url: str) -> AsyncIterator[Redis]:
    redis = Redis.from_url(url)
    try:
        yield redis
    finally:
        await redis.aclose()


def begun(coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """A task that fails where it would wait for ever."""
    return asyncio.create_task(asyncio.wait_for(coroutine, PATIENCE_S))


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if await condition():
                return
            await asyncio.sleep(0.01)


async def blocked(redis: Redis, readers: int = 1) -> None:
    """Returns when so many clients are blocked on Redis."""

    async def enough() -> bool:
        clients: dict[str, int] = await redis.info("clients")
        return clients["blocked_clients"] >= readers

    await until(enough)


def consume(url: str, keys: Keys, what: Callable[["Ender"], Coroutine[Any, Any, T]]) -> T:
    """Lets a consumer do something, in an event loop of its own."""

    async def with_redis() -> T:
        async with a_redis(url) as redis:
            return await what(Ender(redis, keys, "ann"))

    return asyncio.run(with_redis())


class Ender(FakeConsumer):
    """Takes the next job and ends it as a consumer does, keeping the request without its signatures."""

    async def take_next(self) -> tuple[Lease, Delivery]:
        delivery = await self.read_one()
        lease, begun = await self.begin(delivery)
        assert begun.verdict == "ok"
        return lease, delivery

    async def run_next(self) -> tuple[Lease, Delivery]:
        lease, delivery = await self.take_next()
        await self.leases.start(lease, event_kit.started(lease.job_id))
        return lease, delivery

    async def end(self, lease: Lease, delivery: Delivery, event: SucceededEvent | FailedEvent) -> None:
        request = decode_entry(delivery.fields).request
        assert request is not None
        state = JobState.SUCCEEDED if isinstance(event, SucceededEvent) else JobState.FAILED
        dead = isinstance(event, FailedEvent)
        await self.leases.finish(lease, state, event, request.redacted().encode(), dead=dead)

    async def fail_next(self, run: int = 1, **what: Any) -> FailedEvent:
        lease, delivery = await self.run_next()
        event = event_kit.failed(lease.job_id, run=run, **what)
        await self.end(lease, delivery, event)
        return event

    async def expire_next(self, run: int = 1, code: ErrorCode = ErrorCode.LORA_DOWNLOAD_FAILED) -> FailedEvent:
        """Fails the next job during preparation, as one whose presigned URL has expired."""
        lease, delivery = await self.take_next()
        event = event_kit.failed(lease.job_id, run=run)
        data = event.data.model_copy(update={"error_code": code, "retry_after": 0})
        event = event.model_copy(update={"data": data})
        await self.end(lease, delivery, event)
        return event

    async def succeed_next(self, run: int = 1) -> SucceededEvent:
        return await self.succeed(*await self.run_next(), run=run)

    async def succeed(self, lease: Lease, delivery: Delivery, run: int = 1) -> SucceededEvent:
        event = event_kit.succeeded(lease.job_id, run=run)
        await self.end(lease, delivery, event)
        return event
