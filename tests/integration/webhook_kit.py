"""What the webhooks' tests share: deliveries in a database, attempts to a receiver on loopback, worker processes."""

import asyncio
import base64
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import psutil
from sqlalchemy import Engine, update

from producer.database import migrate
from producer.store import Store
from producer.tables import DELIVERIES
from producer.webhooks.delivery import Sender
from producer.webhooks.rows import Deliveries, Delivery
from producer.webhooks.signing import read_secrets
from schemas.events import Event
from schemas.net.http import Deadlines
from schemas.net.urls import HostRules
from tests import event_kit
from tests.integration.client_kit import PATIENCE_S
from tests.s3_stub import S3Stub, Seen

SECRET = "whsec_" + base64.b64encode(b"a webhook secret of 32 bytes....").decode()
LOOPBACK = HostRules.parse("127.0.0.1,localhost", default=HostRules(allow_loopback=True))
QUICK = Deadlines(connect_s=1.0, read_s=0.4, whole_s=0.4)
HOOK = "/hook"


class Bench:
    """Deliveries to a stub. `now` is the clock of everything here; it starts with the real one, and stands still."""

    def __init__(self, engine: Engine, stub: S3Stub) -> None:
        migrate(engine)
        self.engine = engine
        self.stub = stub
        self.now = datetime.now(UTC)
        self.rows = Deliveries(engine, now=lambda: self.now)

    @property
    def hooks(self) -> list[Seen]:
        return [seen for seen in self.stub.seen if seen.path == HOOK]

    def add(self, event: Event | None = None, url: str | None = None) -> str:
        """A pending delivery, as the listener writes it; its event's id."""
        event = event or event_kit.succeeded()
        store = Store(self.engine, now=lambda: self.now)
        assert store.save([event_kit.completion(event)], {event.id: url or self.stub.url + HOOK}) == [True]
        return event.id

    def sender(self, **options: Any) -> Sender:
        defaults: dict[str, Any] = {"secrets": read_secrets(SECRET), "rules": LOOPBACK, "deadlines": QUICK}
        defaults["uniform"] = lambda low, high: low
        return Sender(self.rows, now=lambda: self.now, **(defaults | options))

    async def attempt(self, event_id: str, **options: Any) -> float | None:
        return await asyncio.to_thread(self.sender(**options).attempt, event_id)

    def row(self, event_id: str) -> Delivery:
        row = self.rows.get(event_id)
        assert row is not None
        return row

    def change(self, event_id: str, **values: Any) -> None:
        with self.engine.begin() as connection:
            connection.execute(update(DELIVERIES).where(DELIVERIES.c.event_id == event_id).values(values))

    def later(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


class Work:
    """A process of `python -m producer work`, and those that RQ forks from it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def until_ended(self) -> tuple[int, str]:
        """Its exit status, and what it has said."""
        async with asyncio.timeout(PATIENCE_S):
            out, err = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, (out + err).decode()

    def horses(self) -> list[psutil.Process]:
        """RQ's processes for jobs: each leads a process group, as the scheduler's does not."""
        return [child for child in self._children() if os.getpgid(child.pid) == child.pid]

    def kill(self) -> None:
        """All of them at once."""
        for child in self._children():
            with suppress(psutil.NoSuchProcess):
                child.kill()
        with suppress(ProcessLookupError):
            self.process.kill()

    def _children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


@asynccontextmanager
async def a_worker(environment: dict[str, str], *arguments: str) -> AsyncIterator[Work]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "producer", "work", *arguments),
        env=os.environ | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    work = Work(process)
    try:
        yield work
    finally:
        work.kill()
        await process.communicate()


async def until(condition: Callable[[], bool]) -> None:
    """Looks in a thread, since it may block."""
    async with asyncio.timeout(PATIENCE_S):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.02)
