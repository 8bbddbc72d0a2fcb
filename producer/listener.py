"""The backend's listener: completions -> database -> the backend's own handlers -> acknowledgement."""

import asyncio
import inspect
import socket
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import structlog
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from producer.completions import Completion, Completions, decode_completion
from producer.database import open_engine
from producer.queue import StreamEntry, connect, connect_for_blocking_reads
from producer.settings import ProducerSettings
from producer.store import Store
from producer.tables import STATES
from producer.webhooks.queue import WebhookQueue
from schemas.events import Event
from schemas.keys import DEFAULT_LISTENER_GROUP, Keys
from schemas.redact import redact_text, redact_value

log = structlog.get_logger(__name__)

Handler = Callable[[Event], Awaitable[None] | None]
Enqueue = Callable[[Sequence[str]], None]
HandlerT = TypeVar("HandlerT", bound=Callable[[Any], Awaitable[None] | None])

_BLOCK_S = 1.0
_UPKEEP_EVERY_S = 10.0
_RETRY_BASE_S = 0.2
_RETRY_CAP_S = 30.0
_MAX_DOUBLINGS = 16


class Listener:
    """Stores every completion, hands it to the handlers, acknowledges it, and enqueues its webhook, in this order.

    An event is durable once its transaction is committed, and is acknowledged after its handlers have run: whatever
    dies in between, it comes again. So handlers run at least once per event, and tell repetitions by `event.id`.
    What cannot be decoded is stored as it is, for people, and never blocks the stream.

    The transaction also writes a delivery for each event that has a webhook. `enqueue` gets their event ids, in a
    thread; it may raise redis.RedisError: the row waits for whoever sweeps pending deliveries.
    """

    def __init__(
        self,
        completions: Completions,
        store: Store,
        *,
        enqueue: Enqueue | None = None,
        block_s: float = _BLOCK_S,
        upkeep_every_s: float = _UPKEEP_EVERY_S,
        retry_cap_s: float = _RETRY_CAP_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.completions = completions
        self.store = store
        self._enqueue = enqueue
        self._block_ms = int(block_s * 1000)
        self._upkeep_every_s = upkeep_every_s
        self._backoff = ExponentialWithJitterBackoff(base=min(_RETRY_BASE_S, retry_cap_s), cap=retry_cap_s)
        self._clock = clock
        self._upkeep_at = float("-inf")
        self._prepared = False
        self._handlers: list[tuple[frozenset[str], Handler]] = []

    def on(self, *event_types: str) -> Callable[[HandlerT], HandlerT]:
        """Registers the decorated callable for events of these types; without any, for all of them.

        It gets the event. An async one runs in the listener's loop, a plain one in a thread; they run one after the
        other, in the order of the stream. One that raises is logged, and holds up nobody. Raises ValueError for a type
        that does not exist.
        """
        unknown = set(event_types) - set(STATES)
        if unknown:
            raise ValueError(f"no such event: {', '.join(sorted(unknown))}")

        def register(handler: HandlerT) -> HandlerT:
            self._handlers.append((frozenset(event_types or STATES), handler))
            return handler

        return register

    async def run(self, stop: asyncio.Event) -> None:
        """Listens until `stop` is set; the batch at hand is finished. Outages of Redis and database are waited out."""
        failures = 0
        while not stop.is_set():
            try:
                await self._prepare()
                await self._keep_up()
                await self._handle(await self.completions.read(block_ms=self._block_ms))
                failures = 0
            except (RedisError, SQLAlchemyError, OSError) as error:
                # Nothing of what failed was acknowledged: the same entries come again.
                failures = min(failures + 1, _MAX_DOUBLINGS)
                self.completions.reread()
                delay_s = self._backoff.compute(failures)
                log.warning("listener.waiting", error=redact_value(error), failures=failures, delay_s=round(delay_s, 1))
                await _wait(stop, delay_s)
        await self._leave()

    async def catch_up(self, stop: asyncio.Event | None = None) -> int:
        """Handles what is in the stream now, or until `stop` is set, and returns how many events were new.

        Raises redis.RedisError, sqlalchemy.exc.SQLAlchemyError.
        """
        await self._prepare()
        stored = await self._reclaim()
        while not (stop and stop.is_set()) and (entries := await self.completions.read(block_ms=1)):
            stored += await self._handle(entries)
        await self.completions.trim()
        await self.completions.leave()
        return stored

    async def _prepare(self) -> None:
        if self._prepared:
            return
        await self.completions.ensure_group()  # first: from now on nothing is trimmed that we have not seen
        await asyncio.to_thread(self.store.migrate)
        self._prepared = True

    async def _keep_up(self) -> None:
        """Now and then: takes over what dead listeners left, and trims."""
        if self._clock() < self._upkeep_at:
            return
        self._upkeep_at = self._clock() + self._upkeep_every_s
        await self._reclaim()
        trimmed = await self.completions.trim()
        if trimmed:
            log.info("listener.trimmed", entries=trimmed)

    async def _reclaim(self) -> int:
        stored = 0
        while entries := await self.completions.reclaim():
            log.info("listener.reclaimed", entries=len(entries))
            stored += await self._handle(entries)
        return stored

    async def _handle(self, entries: Sequence[StreamEntry]) -> int:
        """Store, handlers, acknowledgement, webhooks; how many events were new."""
        batch = [decode_completion(entry) for entry in entries]
        webhook_urls = await self.completions.webhook_urls(one.event for one in batch if one.event)
        is_new = await asyncio.to_thread(self.store.save, batch, webhook_urls)
        for completion, new in zip(batch, is_new, strict=True):
            job_id = completion.event.data.job_id if completion.event else None
            with structlog.contextvars.bound_contextvars(
                job_id=job_id, event_id=completion.event_id, entry_id=completion.entry_id
            ):
                await self._hand_out(completion, new=new)
        await self.completions.ack([completion.entry_id for completion in batch])
        new_ids = {completion.event_id for completion, new in zip(batch, is_new, strict=True) if new}
        await self._send(sorted(new_ids & webhook_urls.keys()))
        return len(new_ids)

    async def _send(self, event_ids: Sequence[str]) -> None:
        if not event_ids or self._enqueue is None:
            return
        try:
            await asyncio.to_thread(self._enqueue, event_ids)
        except RedisError as error:
            log.warning("webhook.not_enqueued", events=len(event_ids), error=redact_value(error))

    async def _hand_out(self, completion: Completion, *, new: bool) -> None:
        event = completion.event
        if event is None:
            log.error("completion.undecodable", problem=completion.problem)
            return
        log.info("completion.stored" if new else "completion.seen_before", type=event.type, run=event.data.run)
        for event_types, handler in self._handlers:
            if event.type in event_types:
                await _call(handler, event)

    async def _leave(self) -> None:
        try:
            await self.completions.leave()
        except RedisError as error:
            log.warning("listener.left_silently", error=redact_value(error))


async def _call(handler: Handler, event: Event) -> None:
    try:
        if inspect.iscoroutinefunction(handler):
            await handler(event)
            return
        outcome = await asyncio.to_thread(handler, event)
        if inspect.isawaitable(outcome):
            await outcome
    except Exception as error:
        _log_failure(handler, error)


def _log_failure(handler: Handler, error: Exception) -> None:
    name = getattr(handler, "__qualname__", type(handler).__name__)
    log.error("handler.failed", handler=name, error=redact_text("".join(traceback.format_exception(error))))


async def _wait(stop: asyncio.Event, timeout_s: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), timeout_s)
    except TimeoutError:
        return


@asynccontextmanager
async def from_settings(settings: ProducerSettings, group: str = DEFAULT_LISTENER_GROUP) -> AsyncIterator[Listener]:
    """A listener of `group`, with clients and database of its own. Nothing is read or written before it runs."""
    url = settings.redis_url.get_secret_value()
    name = f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}"
    redis, reader = connect(url), connect_for_blocking_reads(url, block_s=_BLOCK_S)
    webhooks = WebhookQueue(url, settings.prefix)
    engine = open_engine(settings.database_url.get_secret_value())
    completions = Completions(redis, reader, Keys(settings.prefix), group, name)
    try:
        yield Listener(completions, Store(engine), enqueue=webhooks.enqueue)
    finally:
        await reader.aclose()
        await redis.aclose()
        await asyncio.to_thread(webhooks.close)
        await asyncio.to_thread(engine.dispose)
