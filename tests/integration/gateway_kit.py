"""What the gateway's tests share: the application behind a real socket, and a consumer that stores pictures."""

import asyncio
import hashlib
import io
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from PIL import Image
from pydantic import SecretStr
from redis.asyncio import Redis

from consumer.queue import Delivery, Lease
from demo.servers import RedisServer, S3Server
from producer.settings import ProducerSettings
from schemas.entries import decode_entry
from schemas.errors import ErrorCode
from schemas.events import SucceededEvent
from schemas.keys import JobState, Keys
from schemas.requests import GenerationRequest
from tests import event_kit
from tests.integration.client_kit import PATIENCE_S, Ender, until
from tests.integration.queue_kit import job

TOKEN = "t0ken"
BUCKET = "gateway"
PROMPT = {"prompt": "a red fox"}


def a_png() -> bytes:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(picture, "png")
    return picture.getvalue()


PNG = a_png()


def gateway_settings(redis_at: RedisServer, keys: Keys, s3: S3Server | None, **options: Any) -> ProducerSettings:
    storage: dict[str, Any] = {}
    if s3 is not None:
        storage = {
            "r2_endpoint_url": s3.url,
            "r2_bucket": BUCKET,
            "r2_access_key_id": SecretStr(s3.access_key),
            "r2_secret_access_key": SecretStr(s3.secret_key),
        }
    token = {"api_token": SecretStr(TOKEN)}
    return ProducerSettings(redis_url=SecretStr(redis_at.url), prefix=keys.prefix, **{**token, **storage, **options})


class _QuietServer(uvicorn.Server):
    """Takes no signals, and does not look only every tenth of a second whether it should end."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ending = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self.ending.wait()


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[str]:
    """The application's URL, while uvicorn serves it in this event loop."""
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server = _QuietServer(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5))
    task = asyncio.create_task(server.serve([listening]))
    await until(lambda: _true(server.started or task.done()))
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.ending.set()
        await task


async def _true(condition: bool) -> bool:
    return condition


@asynccontextmanager
async def calling(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A caller who has the token."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with serving(app) as url, httpx.AsyncClient(base_url=url, headers=headers, timeout=30) as http:
        yield http


class Painter(Ender):
    """A consumer that stores a picture for each job."""

    s3: S3Server

    async def paint_next(self, run: int = 1) -> GenerationRequest:
        """Waits for the next job and ends it with a picture."""
        lease, delivery = await self.run_one()
        await self.paint(lease, delivery, run)
        return request_of(delivery)

    async def fail_one(self, code: ErrorCode, retry_after: int | None, run: int = 1) -> None:
        """Waits for the next job and ends it without a picture."""
        lease, delivery = await self.run_one()
        event = event_kit.failed(lease.job_id, run=run, error=f"no: {code}")
        data = event.data.model_copy(update={"error_code": code, "retry_after": retry_after})
        await self.end(lease, delivery, event.model_copy(update={"data": data}))

    async def run_one(self) -> tuple[Lease, Delivery]:
        """Waits for the next job."""
        await self.intake.ensure_groups()
        async with asyncio.timeout(PATIENCE_S):
            while not (deliveries := await self.intake.read(block_ms=20)):
                await asyncio.sleep(0.005)
        lease, begun = await self.begin(deliveries[0])
        assert begun.verdict == "ok", begun
        await self.leases.start(lease, event_kit.started(lease.job_id))
        return lease, deliveries[0]

    async def cancel(self, lease: Lease, delivery: Delivery, run: int = 1) -> None:
        """Ends a job as one whose cancellation was asked for."""
        event = event_kit.cancelled(lease.job_id, run=run)
        kept = request_of(delivery).redacted().encode()
        await self.leases.finish(lease, JobState.CANCELLED, event, kept, dead=False)

    async def paint(self, lease: Lease, delivery: Delivery, run: int = 1, **more: Any) -> SucceededEvent:
        """Stores the picture and ends the job with it."""
        key = request_of(delivery).image_key
        client = self.s3.client()
        await asyncio.to_thread(client.put_object, Bucket=BUCKET, Key=key, Body=PNG, ContentType="image/png")
        client.close()
        return await self.end_with_stored_picture(lease, delivery, key, run, **more)

    async def end_with_stored_picture(
        self, lease: Lease, delivery: Delivery, key: str, run: int = 1, **more: Any
    ) -> SucceededEvent:
        stored = {"image_key": key, "image_sha256": hashlib.sha256(PNG).hexdigest(), "image_bytes": len(PNG), **more}
        event = event_kit.succeeded(lease.job_id, run=run, **stored)
        await self.end(lease, delivery, event)
        return event


def request_of(delivery: Delivery) -> GenerationRequest:
    request = decode_entry(delivery.fields).request
    assert request is not None
    return request


async def state_of(redis: Redis, keys: Keys, job_id: str) -> str | None:
    return (await job(redis, keys, job_id)).get("state")


async def only_job_id(redis: Redis, keys: Keys) -> str:
    """The id of the one job that was submitted."""
    found: list[str] = []

    async def there() -> bool:
        prefix = keys.job("")
        found[:] = [name.decode().removeprefix(prefix) async for name in redis.scan_iter(f"{prefix}*")]
        return len(found) == 1

    await until(there)
    return found[0]


async def waiters_of(redis: Redis, keys: Keys, job_id: str) -> int:
    return int(await redis.zcard(keys.waiters(job_id)))
