"""Every bad envelope, parameter and URL in one batch, by bare XADD to a worker on a real Redis, among good jobs."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from consumer.lora.cache import LoraCache
from consumer.lora.fetch import LoraFetcher
from demo.servers import RedisServer
from schemas.keys import Keys, Priority
from schemas.net.http import open_session
from schemas.requests import LoraRef
from tests.fakes import FakeFetcher
from tests.integration.queue_kit import a_request, add, completions, entries
from tests.integration.worker_kit import Bench
from tests.unit.bad_inputs.envelopes import ENVELOPES
from tests.unit.bad_inputs.kit import CANARY, FINE, SIGNED, Outcome, payload
from tests.unit.bad_inputs.parameters import PARAMETERS
from tests.unit.bad_inputs.urls import OWN, URLS, NoNames

TERMINAL = ("generation.succeeded", "generation.failed", "generation.cancelled")


@dataclass(frozen=True)
class Sent:
    """One entry. `job_id` None: nothing in it names a job, and no event can come."""

    name: str
    job_id: str | None
    entry: dict[bytes, bytes]
    outcome: Outcome | None


def everything() -> Iterator[Sent]:
    """Each input twice: as it is, and with its job's id beside it; a good job after every tenth."""
    for number, case in enumerate([*ENVELOPES, *PARAMETERS]):
        bare, beside = f"b-{number:05}", f"n-{number:05}"
        yield Sent(case.name, bare if case.named else None, case.bare(bare), case.outcome)
        if b"job_id" not in case.entry:
            yield Sent(f"{case.name}, named", beside, case.beside_its_id(beside), case.outcome)
        if number % 10 == 0:
            good = a_request(f"g-{number:05}", webhook_url=SIGNED)
            yield Sent(good.job_id, good.job_id, {b"payload": good.encode()}, FINE)
    for number, (name, (url, outcome)) in enumerate(URLS.items()):
        job_id = f"u-{number:05}"
        yield Sent(name, job_id, {b"payload": payload(job_id=job_id, lora_url=url)}, outcome)


def outcome_of(event: dict[str, Any]) -> Outcome | None:
    data = event["data"]
    if event["type"] == "generation.succeeded":
        return FINE
    return Outcome(data["error_code"], data["retry_after"], dead_lettered=data["dead_lettered"])


async def empty(redis: Redis, stream: str) -> None:
    """Waits until every entry has ended."""
    async with asyncio.timeout(60):
        while await redis.xlen(stream):
            await asyncio.sleep(0.02)


async def values(redis: Redis, keys: Keys) -> dict[bytes, str]:
    """All that is left under the keys of the test."""
    found: dict[bytes, str] = {}
    async for key in redis.scan_iter(f"{{{keys.prefix}}}*", count=1000):
        match await redis.type(key):
            case b"hash":
                held: Any = redis.hgetall(key)
                found[key] = str(await held)
            case b"stream":
                found[key] = str(await redis.xrange(key))
            case b"zset":
                found[key] = str(await redis.zrange(key, 0, -1))
            case b"list":
                items: Any = redis.lrange(key, 0, -1)
                found[key] = str(await items)
            case b"string":
                found[key] = str(await redis.get(key))
            case kind:
                raise AssertionError(f"{key!r} is a {kind!r}")
    return found


class Fetcher(FakeFetcher):
    """Fetches the URLs that are bad as a consumer does, where no name can be looked up, and pretends for others."""

    def __init__(self, real: LoraFetcher) -> None:
        super().__init__()
        self._real = real
        self._bad = {url for url, _ in URLS.values()}

    @asynccontextmanager
    async def fetch(self, ref: LoraRef) -> AsyncIterator[Path]:
        fetch = self._real.fetch if ref.url in self._bad else super().fetch
        async with fetch(ref) as path:
            yield path


@pytest.fixture
async def fetcher(tmp_path: Path) -> AsyncIterator[Fetcher]:
    async with open_session(allow_loopback=True, resolver=NoNames()) as session:
        cache = LoraCache(tmp_path, 1 << 20)
        yield Fetcher(LoraFetcher(session, cache, rules=OWN, own_bucket=None, max_bytes=1 << 20))


async def test_each_bad_input_ends_once_with_its_own_code_and_the_good_jobs_are_drawn(
    redis: Redis, keys: Keys, redis_at: RedisServer, fetcher: Fetcher
) -> None:
    """Guards the verdict `refused` of BEGIN, `RequestError` in `Outcomes.end`, and `redact_bytes` in its `_finish`."""
    bench = Bench(redis, keys, redis_at.url, fetcher=fetcher)
    sent = list(everything())
    named = {item.job_id: item for item in sent if item.job_id is not None}
    stream = keys.requests(Priority.NORMAL)
    for item in sent:
        await add(redis, stream, item.entry)
    async with bench.working(prefetch=4):
        await empty(redis, stream)
    ended = [event for event in await completions(redis, keys) if event["type"] in TERMINAL]
    assert set(Counter(event["data"]["job_id"] for event in ended).values()) == {1}
    found = {event["data"]["job_id"]: outcome_of(event) for event in ended}
    assert {named[job_id].name: outcome for job_id, outcome in found.items()} == {
        item.name: item.outcome for item in named.values()
    }
    drawn = [line.removeprefix("draw ") for line in bench.engine.log if line.startswith("draw ")]
    assert sorted(drawn) == sorted(job_id for job_id, item in named.items() if item.outcome is FINE)
    letters = [fields for _, fields in await entries(redis, keys.dead)]
    assert len(letters) == sum(item.job_id is None for item in sent)
    assert {frozenset(letter) for letter in letters} == {frozenset({b"raw", b"source", b"died_at"})}
    left = await values(redis, keys)
    assert [key for key, text in left.items() if CANARY in text] == []
    assert len(left) > len(named)


async def test_a_second_body_under_the_same_id_is_dropped_and_counted(
    redis: Redis, keys: Keys, redis_at: RedisServer
) -> None:
    """Guards the verdict `duplicate` of BEGIN: the first entry of a run owns it, whatever the later ones are."""
    bench = Bench(redis, keys, redis_at.url)
    stream = keys.requests(Priority.NORMAL)
    bodies = [payload(seed=1), payload(seed=2), payload(steps=3), payload(seed=1)]
    for body in bodies:
        await add(redis, stream, {"payload": body})
    async with bench.working(prefetch=0):
        await empty(redis, stream)
    [event] = [event for event in await completions(redis, keys) if event["type"] in TERMINAL]
    assert (event["type"], event["data"]["metadata"]["seed_used"]) == ("generation.succeeded", 1)
    counted: Any = redis.hget(keys.counters, "duplicates")
    assert await counted == b"3"
    assert CANARY not in str(await values(redis, keys))
