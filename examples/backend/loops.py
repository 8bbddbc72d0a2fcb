"""What runs all the time: the relay and the listener, beside the web application or in processes of their own."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from sqlalchemy.orm import Session, sessionmaker

from examples.backend.listening import keep_content
from examples.backend.publishing import open_publisher
from examples.backend.relay import Relay
from examples.backend.settings import BackendSettings
from producer.listener import from_settings
from schemas.redact import redact_value

_STOP_S = 10.0

log = structlog.get_logger(__name__)


async def run_relay(settings: BackendSettings, sessions: sessionmaker[Session], committed: asyncio.Event) -> None:
    """Publishes until it is cancelled, at once when `committed` is set."""
    async with open_publisher(settings) as publish:
        await Relay(sessions, publish, poll_s=settings.poll_s, committed=committed).run()


async def run_listener(settings: BackendSettings, sessions: sessionmaker[Session], stop: asyncio.Event) -> None:
    """Listens until `stop` is set. Whatever the provider: the queue may still hold jobs of the time before."""
    async with from_settings(settings) as listener:
        keep_content(listener, sessions)
        await listener.run(stop)


@asynccontextmanager
async def running(
    settings: BackendSettings, sessions: sessionmaker[Session], committed: asyncio.Event
) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Both, until the block ends. Each may be ended anywhere: nothing is lost, and nothing is made twice."""
    stop = asyncio.Event()
    relay = asyncio.create_task(run_relay(settings, sessions, committed))
    listener = asyncio.create_task(run_listener(settings, sessions, stop))
    for task in (relay, listener):
        task.add_done_callback(_tell)
    try:
        yield [relay, listener]
    finally:
        relay.cancel()
        stop.set()
        await asyncio.wait([listener], timeout=_STOP_S)  # it ends the batch at hand
        listener.cancel()
        await asyncio.wait([relay, listener])


def _tell(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("loop.died", error=redact_value(error))
