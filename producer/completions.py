"""The completions stream as one listener sees it: a consumer group of its own, read, acknowledged, trimmed."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from producer.queue import StreamEntry
from producer.stream_ids import stream_time
from schemas import lua
from schemas.events import Event, EventError, decode_event, is_terminal
from schemas.fields import is_job_id
from schemas.keys import IDLE_NAME_MS, Keys
from schemas.redact import redact_bytes
from schemas.requests import RequestError, decode_request

log = structlog.get_logger(__name__)

_COUNT = 100
_MAX_KEPT_BYTES = 64 * 1024
_MAX_EVENT_ID = 200
_MAX_WEBHOOK_URL = 2048  # an index of PostgreSQL takes little more


@dataclass(frozen=True, slots=True)
class Completion:
    """One entry of the stream. `event` is None exactly when `problem` says why it could not be decoded.

    `payload` holds the event's own bytes; of an undecodable entry the first 64 KiB of its redacted payload, or of all
    its fields where it has none.
    """

    entry_id: str
    payload: bytes
    event: Event | None
    problem: str | None = None

    @property
    def event_id(self) -> str:
        """The event's id, or one made from the entry's where there is no event."""
        return self.event.id if self.event else f"undecodable:{self.entry_id}"

    @property
    def published_at(self) -> datetime:
        """When the entry was added, by the server's clock."""
        return stream_time(self.entry_id)


def decode_completion(entry: StreamEntry) -> Completion:
    """Reads an entry, whatever is in it."""
    payload = entry.fields.get(b"payload")
    if payload is None:
        kept = b"\n".join(name + b"=" + value for name, value in entry.fields.items())
        return _undecodable(entry.entry_id, kept, "the entry has no payload")
    try:
        event = decode_event(payload)
        _check_storable(event)
    except EventError as error:
        return _undecodable(entry.entry_id, payload, str(error))
    return Completion(entry.entry_id, payload, event)


def _undecodable(entry_id: str, raw: bytes, problem: str) -> Completion:
    return Completion(entry_id, redact_bytes(raw)[:_MAX_KEPT_BYTES], None, problem)


def _check_storable(event: Event) -> None:
    """Refuses what fits the model and no database: it would fail at every attempt, and hold up all that follows."""
    if not is_job_id(event.data.job_id) or not 0 < len(event.id) <= _MAX_EVENT_ID or "\0" in event.id:
        raise EventError("its ids are not of this contract")
    try:
        event.timestamp.astimezone(UTC)
    except OverflowError:
        raise EventError("its time is outside the calendar") from None
    echoed = {"data": {"request_metadata", "details"}}  # kept as text: their integers may have any size
    if not _is_finite(event.model_dump()) or not _fits_int64(event.model_dump(exclude=echoed)):
        raise EventError("a number in it is not finite, or has more than 64 bits")


def _is_finite(value: Any) -> bool:
    return all(math.isfinite(number) for number in _numbers(value) if isinstance(number, float))


def _fits_int64(value: Any) -> bool:
    return all(-(2**63) <= number < 2**63 for number in _numbers(value) if isinstance(number, int))


def _numbers(value: Any) -> Iterator[int | float]:
    match value:
        case int() | float():
            yield value
        case dict():
            yield from chain.from_iterable(map(_numbers, value.values()))
        case list() | tuple():
            yield from chain.from_iterable(map(_numbers, value))


def _webhook_url(payload: bytes | None) -> str | None:
    try:
        url = decode_request(payload).redacted().webhook_url if payload else None
    except RequestError:
        return None
    if url is not None and len(url) > _MAX_WEBHOOK_URL:
        log.warning("webhook.url_too_long", characters=len(url))
        return None
    return url


class Completions:
    """The group `group`, read under the consumer name `name`, which must be unique to this process' start.

    `reader` blocks, `redis` does the rest. Every method may raise redis.RedisError and may then be called again.
    """

    def __init__(self, redis: Redis, reader: Redis, keys: Keys, group: str, name: str) -> None:
        self._redis = redis
        self._reader = reader
        self._keys = keys
        self._stream = keys.completions
        self._group = group
        self._name = name
        self._own_first = True
        self._trim = redis.register_script(lua.TRIM_COMPLETIONS)
        self._forget_idle_names = redis.register_script(lua.FORGET_IDLE_NAMES)

    async def ensure_group(self) -> None:
        """Creates the group, from the stream's first entry on; removes names that killed listeners left in it."""
        try:
            await self._redis.xgroup_create(self._stream, self._group, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise
        await self._forget_idle_names(keys=[self._stream], args=[self._group, IDLE_NAME_MS])

    def reread(self) -> None:
        """Lets the next `read` begin with what was delivered to us and is not acknowledged."""
        self._own_first = True

    async def read(self, *, block_ms: int) -> list[StreamEntry]:
        """Up to 100 entries; waits `block_ms` for new ones.

        Entries that are pending under our name come first at the start, after an error here, and after `reread`: until
        they are acknowledged, nothing else comes.
        """
        try:
            if self._own_first:
                pending = await self._read_group("0")
                if pending:
                    return pending
                self._own_first = False
            return await self._read_group(">", block_ms)
        except RedisError:
            self._own_first = True  # the reply that was lost may have held entries
            raise

    async def reclaim(self, *, idle_ms: int = 30_000) -> list[StreamEntry]:
        """Up to 100 entries that other listeners got `idle_ms` ago and have not acknowledged."""
        cursor = "0-0"
        while True:
            try:
                reply: Any = await self._redis.xautoclaim(
                    self._stream, self._group, self._name, idle_ms, start_id=cursor, count=_COUNT
                )
            except ResponseError as error:
                await self._recover(error)
                return []
            claimed = [entry for entry in reply[1] if entry[0] is not None]
            if len(claimed) < len(reply[1]):
                self._own_first = True  # Redis 6.2 claims deleted entries without saying which: `read` finds their ids
            found = await self._existing(claimed)
            cursor = reply[0].decode()
            if found or cursor == "0-0":
                return found

    async def webhook_urls(self, events: Iterable[Event]) -> dict[str, str]:
        """Where the terminal ones of these events are to be delivered, by event id, without any URL's query.

        The job's hash says it: of a job whose hash has expired, or holds no request, nothing is known. Where a later
        run has it by now, that run's URL is taken for the job's.
        """
        ended = [event for event in events if is_terminal(event.type)]
        pipe = self._redis.pipeline(transaction=False)
        for event in ended:
            pipe.hget(self._keys.job(event.data.job_id), "payload")
        payloads: list[bytes | None] = await pipe.execute()
        found = zip(ended, map(_webhook_url, payloads), strict=True)
        return {event.id: url for event, url in found if url is not None}

    async def ack(self, entry_ids: Sequence[str]) -> None:
        """Acknowledges entries: they are never delivered to this group again."""
        if entry_ids:
            await self._redis.xack(self._stream, self._group, *entry_ids)

    async def trim(self) -> int:
        """Deletes what every group has acknowledged; returns how many entries went. Without a group, none."""
        return int(await self._trim(keys=[self._stream]))

    async def leave(self) -> None:
        """Takes our name out of the group, unless entries are pending under it: those are left to be reclaimed."""
        # DELCONSUMER would drop what is still pending under the name
        if not await self._redis.xpending_range(self._stream, self._group, "-", "+", 1, consumername=self._name):
            await self._redis.xgroup_delconsumer(self._stream, self._group, self._name)

    async def drop_group(self, name: str) -> bool:
        """Forgets a group, so that it no longer holds back the trimming; whether there was one."""
        try:
            return bool(await self._redis.xgroup_destroy(self._stream, name))
        except ResponseError as error:
            if "requires the key to exist" in str(error):
                return False
            raise

    async def _read_group(self, after: str, block_ms: int | None = None) -> list[StreamEntry]:
        try:
            reply: Any = await self._reader.xreadgroup(
                self._group, self._name, {self._stream: after}, count=_COUNT, block=block_ms
            )
        except ResponseError as error:
            await self._recover(error)
            return []
        entries = [entry for _, batch in reply for entry in batch]
        found = await self._existing(entries)
        if entries and not found:  # all of them were deleted: what we look for is behind them
            return await self._read_group(after, block_ms)
        return found

    async def _recover(self, error: ResponseError) -> None:
        # A flush or a failover took the group. What the stream holds now is delivered from its first entry on.
        if not str(error).startswith("NOGROUP"):
            raise error
        log.warning("completions.group_missing", group=self._group)
        await self.ensure_group()

    async def _existing(self, entries: Iterable[Any]) -> list[StreamEntry]:
        """Acknowledges the entries that were deleted while they were pending, and returns the others."""
        found = [StreamEntry(entry_id.decode(), fields) for entry_id, fields in entries if fields]
        await self.ack([entry_id.decode() for entry_id, fields in entries if not fields])
        return found
