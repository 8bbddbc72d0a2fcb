"""Dead letters for tests: jobs that die as consumers let them, many at once, and a Redis whose replies get lost."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import Redis

from consumer.queue import Held, Lease
from producer.async_client import AsyncGenerationClient
from producer.dead_letters import DeadLetter, LetterFilter, Replayer, ReplayResult, find, replay_each
from producer.queue import ProducerQueue
from producer.storage import PresignedUrls
from schemas.entries import decode_entry
from schemas.errors import ErrorCode
from schemas.events import FailedEvent
from schemas.keys import JobState, Keys, Priority
from tests.event_kit import failed
from tests.integration.client_kit import a_client
from tests.integration.queue_kit import FakeConsumer, a_request, entries

CANARY = "c0ffee5ec2e7"
OWN = "https://store.example/bucket/loras/fox.safetensors"
FOREIGN = "https://elsewhere.example/fox.safetensors"
EVERY = LetterFilter()


def a_signing_client(url: str, keys: Keys) -> AsyncGenerationClient:
    storage = PresignedUrls(
        endpoint_url="https://store.example", bucket="bucket", access_key_id="id", secret_access_key=CANARY
    )
    return a_client(url, keys, storage=storage)


async def finish(ann: FakeConsumer, lease: Lease, event: FailedEvent) -> None:
    request = decode_entry(lease.delivery.fields).request
    assert request is not None
    payload = request.redacted().encode()
    assert await ann.leases.finish(lease, JobState.FAILED, event, payload, dead=event.data.dead_lettered) is Held.OK


async def die(ann: FakeConsumer, code: ErrorCode = ErrorCode.GENERATION_FAILED, run: int = 1) -> None:
    """The next job fails, and could succeed."""
    lease, begun = await ann.take()
    assert begun.verdict == "ok"
    event = failed(lease.job_id, run=run)
    await finish(ann, lease, event.model_copy(update={"data": event.data.model_copy(update={"error_code": code})}))


async def a_dead_job(client: AsyncGenerationClient, ann: FakeConsumer, job_id: str = "job-1", **fields: Any) -> None:
    await client.submit(job_id=job_id, prompt="a red fox", **fields)
    await die(ann)


async def many_dead_jobs(redis: Redis, keys: Keys, count: int) -> None:
    """Dead letters as `finish` leaves them. Of every second job no hash is left."""
    pipe = redis.pipeline(transaction=False)
    for number in range(count):
        job_id = f"job-{number}"
        request = a_request(job_id)
        what: dict[Any, Any] = {"run": "1", "payload": request.encode(), "event": failed(job_id).encode()}
        letter = {"job_id": job_id, "attempts": "1", "source": keys.requests(Priority.NORMAL), **what}
        pipe.xadd(keys.dead, {**letter, "died_at": "1767323045000"})
        if number % 2:
            job = {"state": "failed", "attempt": "1", "priority": "normal", "entry_id": "1-1", **what}
            times: dict[Any, Any] = {"submitted_at": "1767323040000", "ended_at": "1767323045000"}
            pipe.hset(keys.job(job_id), mapping={**job, **times, "fingerprint": request.fingerprint()})
    await pipe.execute()


async def every_letter(queue: ProducerQueue, where: LetterFilter = EVERY, limit: int | None = None) -> list[DeadLetter]:
    return [letter async for letter in find(queue, where, limit=limit)]


async def the_letter(queue: ProducerQueue) -> DeadLetter:
    [letter] = await every_letter(queue)
    return letter


async def replay(
    client: AsyncGenerationClient,
    letters: Iterable[DeadLetter],
    *,
    changes: Mapping[str, Any] | None = None,
    dry_run: bool = False,
) -> list[ReplayResult]:
    replayer = Replayer(client.queue, storage=client.storage, changes=changes, dry_run=dry_run)
    return [result async for result in replay_each(replayer, [letter.entry_id for letter in letters])]


async def waiting(redis: Redis, keys: Keys, priority: Priority = Priority.NORMAL) -> list[dict[bytes, bytes]]:
    return [fields for _, fields in await entries(redis, keys.requests(priority))]


async def runs(redis: Redis, keys: Keys) -> list[tuple[str, str]]:
    """Job ids and runs of what waits, in order of submission."""
    found = await waiting(redis, keys)
    return [(fields[b"job_id"].decode(), fields[b"run"].decode()) for fields in found]


class LossyRedis:
    """A way to a Redis. The reply to the next command with `lose` in it is lost with its connection; Redis had it."""

    def __init__(self, port: int) -> None:
        self._redis_port = port
        self.url = ""
        self.lose = b""
        self.lost = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_redis, to_redis = await asyncio.open_connection("127.0.0.1", self._redis_port)
        try:
            while command := await reader.read(65536):
                to_redis.write(command)
                reply = await from_redis.read(65536)
                if self.lose and self.lose in command:
                    self.lose, self.lost = b"", self.lost + 1
                    return
                writer.write(reply)
        except ConnectionError:
            pass
        finally:
            writer.close()
            to_redis.close()


@asynccontextmanager
async def a_lossy_redis(port: int) -> AsyncIterator[LossyRedis]:
    lossy = LossyRedis(port)
    async with await asyncio.start_server(lossy.serve, "127.0.0.1", 0) as server:
        lossy.url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        yield lossy
