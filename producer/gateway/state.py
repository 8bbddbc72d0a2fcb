"""What the routes share while the application runs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request
from redis.asyncio import Redis

from producer.async_client import AsyncGenerationClient
from producer.gateway.tasks import Background
from producer.gateway.waiters import Waiters
from producer.pictures import Pictures
from producer.queue import connect
from producer.settings import ProducerSettings
from producer.waking import Wake, wake_quietly
from schemas.keys import Keys


@dataclass(frozen=True, slots=True)
class Gateway:
    """`limit_s` is the longest that a synchronous call lasts. `closing` ends what is still under way, with a 503.

    `for_callers` submits the runs of synchronous calls.
    """

    client: AsyncGenerationClient
    for_callers: AsyncGenerationClient
    redis: Redis
    keys: Keys
    waiters: Waiters
    background: Background
    pictures: Pictures | None
    limit_s: float
    closing: asyncio.Event = field(default_factory=asyncio.Event)


@asynccontextmanager
async def open_gateway(settings: ProducerSettings, *, limit_s: float, wake: Wake | None) -> AsyncIterator[Gateway]:
    """Everything for one event loop. Nothing connects before it is used."""
    keys = Keys(settings.prefix)
    redis = connect(settings.redis_url.get_secret_value())
    background = Background()
    later = None if wake is None else _later(wake, background)
    async with (
        AsyncGenerationClient.from_settings(settings, wake=later) as client,
        AsyncGenerationClient.from_settings(settings, wake=later, for_callers=True) as for_callers,
        Pictures.from_settings(settings) as pictures,
        aclosing(redis),
        aclosing(background),
    ):
        waiters = Waiters(redis, keys, client.queue, background)
        yield Gateway(client, for_callers, redis, keys, waiters, background, pictures, limit_s)


def _later(wake: Wake, background: Background) -> Wake:
    """Wakes without keeping anybody waiting."""

    async def start() -> None:
        background.start(wake_quietly(wake))

    return start


def _of(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


TheGateway = Annotated[Gateway, Depends(_of)]
