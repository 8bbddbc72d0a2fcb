"""What a queue keeps in Redis does not grow with the jobs that have gone through it."""

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from consumer.queue import Delivery, Held, Lease, scripts
from demo.servers import RedisServer, redis_server
from producer.client import AsyncGenerationClient
from producer.completions import Completions
from producer.dead_letters import Replayer
from producer.errors import ProducerError
from schemas.entries import decode_entry
from schemas.events import TerminalEvent
from schemas.keys import DEAD_MAX_ENTRIES, ENDED_MAX_ENTRIES, JobState, Keys, Priority
from tests import event_kit
from tests.integration.client_kit import Ender, a_client, a_redis, until
from tests.integration.queue_kit import add, entries, let_lease_run_out, retrying

_BATCH = 1000
_LEAST_SAMPLES = 15
_DEAD_CAP = 200
_NODE_ENTRIES = 100  # `~` trims whole nodes of a stream
_SLACK_BYTES = 64 * 1024
_TTL_S = 0.05
_NAMES = ("ann", "bob", "cleo", "dan")


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis whose memory nobody else uses."""
    with redis_server(tmp_path) as server:
        yield server


@pytest.fixture
def few_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cap on dead letters is reached soon."""
    assert scripts.FINISH.count(str(DEAD_MAX_ENTRIES)) == 1
    monkeypatch.setattr(scripts, "FINISH", scripts.FINISH.replace(str(DEAD_MAX_ENTRIES), str(_DEAD_CAP)))


class Traffic:
    """Jobs without a GPU, through whatever a job can go through."""

    def __init__(self, redis: Redis, keys: Keys, client: AsyncGenerationClient) -> None:
        self._redis = redis
        self._keys = keys
        self._client = client
        self._consumers = [Ender(redis, keys, name, job_ttl_s=_TTL_S) for name in _NAMES]
        self._listener = Completions(redis, redis, keys, "listeners", "lea")
        self._submitted = 0

    async def batch(self, jobs: int) -> None:
        """Submits so many jobs, sees all of them to their end, and lets the listener hear of it."""
        await self._listener.ensure_group()
        numbers = range(self._submitted, self._submitted + jobs)
        self._submitted += jobs
        requests = [{"job_id": f"job-{n}", "prompt": "a fox", "tenant": f"tenant-{n % 7}"} for n in numbers]
        for share, priority in enumerate(Priority):
            outcomes = await self._client.submit_many(requests[share::3], priority=priority)
            assert not [outcome for outcome in outcomes if isinstance(outcome, ProducerError)]
        for number in numbers[4::20]:
            await self._client.cancel(f"job-{number}")
        await self._work()
        for letter in await self._client.queue.dead_letters(count=max(1, jobs // 100)):
            await Replayer(self._client.queue).replay(letter.entry_id)
        await self._work()
        await self._listen()

    async def _work(self) -> None:
        await asyncio.gather(*map(self._consume, self._consumers))

    async def _consume(self, consumer: Ender) -> None:
        await consumer.intake.ensure_groups()
        await consumer.presence.heartbeat({"state": "idle"})
        left = True
        while left:
            while found := await consumer.intake.read(block_ms=1) or await consumer.intake.reclaim(()):
                for delivery in found:
                    await self._see_through(consumer, delivery)
            left = bool(await consumer.intake.promote())

    async def _see_through(self, consumer: Ender, delivery: Delivery) -> None:
        leases, request = consumer.leases, decode_entry(delivery.fields).request
        lease, begun = await consumer.begin(delivery)
        await leases.start(lease, event_kit.started(lease.job_id, attempt=begun.attempt))
        await leases.progress(lease, 1, 28, 13.5)
        assert request is not None
        kind = int(lease.job_id.removeprefix("job-")) % 20
        if kind in (2, 3) and begun.attempt == 1:
            await leases.retry(lease, retrying(lease), 0)
        elif kind == 6 and begun.attempt == 1:
            await let_lease_run_out(self._redis, self._keys, delivery, consumer.name)  # the consumer died
        else:
            await self._end(consumer, lease, kind, request.redacted().encode())

    async def _end(self, consumer: Ender, lease: Lease, kind: int, payload: bytes) -> None:
        if kind == 5:
            await self._client.cancel(lease.job_id)
        states = {0: JobState.FAILED, 1: JobState.FAILED, 5: JobState.CANCELLED}
        event: TerminalEvent
        match kind:
            case 0 | 1:
                event = event_kit.failed(lease.job_id, dead=kind == 0)
            case 5:
                event = event_kit.cancelled(lease.job_id)
            case _:
                event = event_kit.succeeded(lease.job_id)
        state = states.get(kind, JobState.SUCCEEDED)
        assert await consumer.leases.finish(lease, state, event, payload, dead=kind == 0) is Held.OK

    async def _listen(self) -> None:
        while found := await self._listener.read(block_ms=1):
            await self._listener.ack([entry.entry_id for entry in found])
        await self._listener.trim()


async def keys_of_jobs(redis: Redis, keys: Keys) -> set[str]:
    """What is kept beside the few keys that every queue has."""
    fixed = {*keys.request_streams, keys.completions, keys.dead, keys.ended, keys.consumers}
    fixed |= {keys.consumer(name) for name in _NAMES}
    return {key.decode() async for key in redis.scan_iter(count=1000)} - fixed


async def used_memory(redis: Redis) -> int:
    with suppress(ResponseError):  # not with every allocator
        await redis.memory_purge()
    return int((await redis.info("memory"))["used_memory"])


def report(document: dict[str, Any]) -> None:
    print(json.dumps(document))
    if folder := os.environ.get("SDXL_CHAOS_OUT"):
        Path(folder, "memory.json").write_text(json.dumps(document, indent=2) + "\n")


async def test_memory_is_flat_however_many_jobs_have_gone_through(
    own_redis: RedisServer, keys: Keys, few_letters: None
) -> None:
    """Jobs that succeed, fail, die, are retried, cancelled, left behind and replayed; SDXL_CHAOS_JOBS of them.

    Guards the PEXPIREs and the LTRIM of END_RUN, the MAXLEN of dead letters, and TRIM_COMPLETIONS. Each sample is taken
    when the jobs before it have expired.
    """
    jobs = int(os.environ.get("SDXL_CHAOS_JOBS", "900"))
    samples: list[dict[str, int]] = []
    async with a_redis(own_redis.url) as redis, a_client(own_redis.url, keys, job_ttl_s=_TTL_S) as client:

        async def no_job_is_left() -> bool:
            return not await keys_of_jobs(redis, keys)

        traffic = Traffic(redis, keys, client)
        batch = min(_BATCH, jobs // _LEAST_SAMPLES)
        for done in range(batch, jobs + 1, batch):
            await traffic.batch(batch)
            await until(no_job_is_left)
            samples.append(
                {
                    "jobs": done,
                    "used_memory_bytes": await used_memory(redis),
                    "keys": await redis.dbsize(),
                    "dead_letters": await redis.xlen(keys.dead),
                }
            )
        report({"jobs": jobs, "samples": samples})
        assert await redis.xlen(keys.completions) <= 1
        assert await redis.llen(keys.ended) == ENDED_MAX_ENTRIES
        assert sum([await redis.xlen(stream) for stream in keys.request_streams]) == 0
    third = len(samples) // 3
    second, last = samples[third:-third], samples[-third:]
    bytes_of = [median(sample["used_memory_bytes"] for sample in part) for part in (second, last)]
    assert bytes_of[1] <= 1.1 * bytes_of[0] + _SLACK_BYTES
    assert {sample["keys"] for sample in last} == {sample["keys"] for sample in second}
    if jobs >= 20 * 2 * _DEAD_CAP:
        assert all(sample["dead_letters"] <= _DEAD_CAP + _NODE_ENTRIES for sample in last)


async def fill(redis: Redis, stream: str, count: int) -> None:
    await redis.eval("for i = 1, ARGV[1] do redis.call('XADD', KEYS[1], '*', 'raw', i) end", 1, stream, str(count))


@pytest.mark.parametrize("by", ["finish", "bury"])
async def test_of_dead_letters_the_newest_are_kept(redis: Redis, keys: Keys, ann: Ender, by: str) -> None:
    """Guards MAXLEN in `add_letter` of the consumer's scripts."""
    await fill(redis, keys.dead, DEAD_MAX_ENTRIES + 2 * _NODE_ENTRIES)
    payload = '{"job_id":"job-1","prompt":"a fox"}' if by == "finish" else "no request"
    await add(redis, keys.requests(Priority.HIGH), {"payload": payload})
    if by == "finish":
        await ann.fail_next()
    else:
        await ann.leases.bury(await ann.read_one(), b"no request")
    kept = await redis.xlen(keys.dead)
    assert DEAD_MAX_ENTRIES <= kept <= DEAD_MAX_ENTRIES + _NODE_ENTRIES
    reply: Any = await redis.xrevrange(keys.dead, count=1)
    [(_, newest)] = reply
    assert newest[b"source"] == keys.requests(Priority.HIGH).encode()
    await redis.delete(keys.dead)


async def test_what_only_a_job_needs_does_not_outlive_it(
    redis: Redis, keys: Keys, client: AsyncGenerationClient
) -> None:
    """Guards the PEXPIRE of the progress in END_RUN: a job that is forgotten after a minute is so altogether."""
    ann = Ender(redis, keys, "ann", job_ttl_s=60)
    await client.submit(job_id="job-1", prompt="a fox")
    lease, delivery = await ann.run_next()
    await ann.leases.progress(lease, 1, 28, 13.5)
    await client.cancel("job-1")
    await ann.succeed(lease, delivery)
    assert 0 < await redis.pttl(keys.progress("job-1")) <= 60_000
    assert 0 < await redis.pttl(keys.job("job-1")) <= 60_000
    assert await redis.exists(keys.cancel("job-1")) == 0


async def names(redis: Redis, stream: str, group: str) -> set[str]:
    found: Any = await redis.xinfo_consumers(stream, group)
    return {consumer["name"].decode() for consumer in found}


async def test_names_that_killed_consumers_left_are_removed_by_the_next_start(
    redis: Redis, keys: Keys, ann: Ender, bob: Ender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards `ensure_groups`, and what FORGET_IDLE_NAMES looks at: `idle`, and what is pending, lost with its name."""
    stream = keys.requests(Priority.NORMAL)
    await add(redis, stream, {"payload": "x"})
    await add(redis, stream, {"payload": "y"})
    await ann.leases.bury(await ann.read_one(), b"x")
    held = await bob.read_one()
    await Ender(redis, keys, "cleo").intake.ensure_groups()
    assert await names(redis, stream, "consumers") == {"ann", "bob"}
    monkeypatch.setattr("consumer.queue.intake.IDLE_NAME_MS", 0)
    await Ender(redis, keys, "dan").intake.ensure_groups()
    assert await names(redis, stream, "consumers") == {"bob"}
    await add(redis, stream, {"payload": "z"})
    assert [delivery.fields[b"payload"] for delivery in await ann.intake.read(block_ms=1)] == [b"z"]
    assert await bob.leases.bury(held, b"y") is Held.OK


async def test_names_that_killed_listeners_left_are_removed_by_the_next_start(
    redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards `Completions.ensure_group`."""
    killed, holds, starts = (Completions(redis, redis, keys, "listeners", name) for name in ("killed", "holds", "new"))
    await killed.ensure_group()
    for reader in (killed, holds):
        await add(redis, keys.completions, {"payload": "x"})
        [entry] = await reader.read(block_ms=1)
        if reader is killed:
            await reader.ack([entry.entry_id])
    await starts.ensure_group()
    assert await names(redis, keys.completions, "listeners") == {"holds", "killed"}
    monkeypatch.setattr("producer.completions.IDLE_NAME_MS", 0)
    await starts.ensure_group()
    assert await names(redis, keys.completions, "listeners") == {"holds"}


async def test_events_that_a_slower_group_holds_or_has_pending_are_not_trimmed(redis: Redis, keys: Keys) -> None:
    """Guards `trim`: the minimum over the groups, and that a group's oldest pending entry comes before its last one."""
    quick, slow = (Completions(redis, redis, keys, group, "lea") for group in ("quick", "slow"))
    await quick.ensure_group()
    await slow.ensure_group()
    there = [await add(redis, keys.completions, {"payload": str(number)}) for number in range(5)]
    await quick.read(block_ms=1)
    await quick.ack(there)
    assert await quick.trim() == 0
    await slow.read(block_ms=1)
    await slow.ack([there[0], there[1], there[4]])
    assert await quick.trim() == 2
    assert [entry_id.decode() for entry_id, _ in await entries(redis, keys.completions)] == there[2:]
    await slow.ack(there[2:4])
    assert await quick.trim() == 2
