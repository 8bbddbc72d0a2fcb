"""Dead letters as the consumer's own scripts write them, and their replay by the client, on a real Redis."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from consumer.queue import Held, Lease
from demo.servers import RedisServer
from producer.client import AsyncGenerationClient
from producer.dead_letters import DeadLetter, Verdict, decode_dead_letter, drop, list_dead, replay, show
from producer.errors import JobUnknown
from producer.queue import ProducerQueue, StreamEntry
from producer.storage import PresignedUrls
from schemas.entries import decode_entry
from schemas.errors import ErrorCode
from schemas.events import FailedEvent
from schemas.keys import JobState, Keys, Priority
from tests.event_kit import failed
from tests.integration.queue_kit import FakeConsumer, add, entries, job, where_is

CANARY = "c0ffee5ec2e7"
OWN = "https://store.example/bucket/loras/fox.safetensors"
FOREIGN = "https://elsewhere.example/fox.safetensors"


@pytest.fixture
async def client(redis_at: RedisServer, keys: Keys) -> AsyncIterator[AsyncGenerationClient]:
    storage = PresignedUrls(
        endpoint_url="https://store.example", bucket="bucket", access_key_id="id", secret_access_key=CANARY
    )
    made = AsyncGenerationClient(redis_at.url, prefix=keys.prefix, max_queue=100, job_ttl_s=600, storage=storage)
    async with made:
        yield made


@pytest.fixture
def queue(client: AsyncGenerationClient) -> ProducerQueue:
    return client.queue


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


async def the_letter(queue: ProducerQueue) -> DeadLetter:
    [letter] = await list_dead(queue)
    return letter


async def waiting(redis: Redis, keys: Keys, priority: Priority = Priority.NORMAL) -> list[dict[bytes, bytes]]:
    return [fields for _, fields in await entries(redis, keys.requests(priority))]


async def everything(redis: Redis, keys: Keys) -> dict[bytes, bytes | None]:
    """Every value of this test, byte for byte."""
    names = [name async for name in redis.scan_iter(match=f"{{{keys.prefix}}}:*")]
    return {name: await redis.dump(name) for name in sorted(names)}


async def test_a_letter_says_which_run_died_when_how_and_of_what(
    client: AsyncGenerationClient, queue: ProducerQueue, ann: FakeConsumer, keys: Keys
) -> None:
    await client.submit(
        job_id="job-1", prompt="a red fox", seed=7, lora_url=f"{OWN}?sig={CANARY}", priority=Priority.LOW
    )
    await die(ann, ErrorCode.CUDA_OOM)
    letter = await the_letter(queue)
    assert (letter.job_id, letter.run, letter.attempts, letter.raw) == ("job-1", 1, 1, None)
    assert (letter.error_code, letter.source, letter.priority) == (
        ErrorCode.CUDA_OOM,
        keys.requests(Priority.LOW),
        Priority.LOW,
    )
    assert letter.request is not None
    assert (letter.request.seed, letter.request.lora_url) == (7, OWN)
    assert letter.event is not None
    assert letter.event.id == "job-1:1:failed"
    assert letter.payload == letter.request.encode()
    assert abs(letter.died_at - datetime.now(UTC)) < timedelta(minutes=10)
    assert CANARY not in repr(letter)


async def test_an_entry_without_a_job_is_shown_by_its_raw_bytes(
    redis: Redis, keys: Keys, queue: ProducerQueue, ann: FakeConsumer
) -> None:
    await redis.xadd(keys.requests(Priority.HIGH), {b"payload": b"\xff{"})
    delivery = await ann.read_one()
    assert await ann.leases.bury(delivery, b"\xff{") is Held.OK
    letter = await the_letter(queue)
    assert (letter.raw, letter.job_id, letter.run, letter.request, letter.event) == (b"\xff{", None, None, None, None)
    assert letter.error_code is None
    assert letter.priority is Priority.HIGH


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {b"job_id": b"\xff", b"run": b"\xff", b"payload": b"\xff", b"event": b"\xff", b"attempts": b"-1"},
        {b"job_id": b"job-1", b"run": b"9" * 5000, b"payload": b"{}", b"died_at": b"9" * 16, b"source": b"\xff"},
        {b"job_id": b"job-1", b"run": b"0", b"payload": b"[" * 5000, b"event": b"[]", b"died_at": b"soon"},
        {b"job_id": b"job-1", b"payload": b'{"job_id":"job-1","prompt":"x"}', b"died_at": "١".encode()},
    ],
    ids=["empty", "binary", "numbers", "deep", "no run"],
)
async def test_a_letter_that_cannot_be_decoded_is_shown_as_such_and_never_replayed(
    redis: Redis, keys: Keys, client: AsyncGenerationClient, queue: ProducerQueue, fields: dict[bytes, bytes]
) -> None:
    entry_id = await add(redis, keys.dead, {**fields, b"other": b"x"})
    letter = await show(queue, entry_id)
    assert letter == (await list_dead(queue))[0]
    assert letter.died_at.tzinfo is UTC
    [result] = await replay(client, queue, [letter])
    assert (result.verdict, result.entry_id) == (Verdict.UNDECODABLE, entry_id)
    assert await redis.xlen(keys.dead) == 1


def test_a_letter_without_a_time_died_when_it_was_added() -> None:
    letter = decode_dead_letter(StreamEntry("1767323045678-0", {}))
    assert letter.died_at == datetime(2026, 1, 2, 3, 4, 5, 678_000, UTC)
    assert decode_dead_letter(StreamEntry("18446744073709551615-0", {})).died_at.year == 9999


async def test_letters_are_listed_by_code_in_order_of_death_up_to_a_limit(
    redis: Redis, keys: Keys, queue: ProducerQueue
) -> None:
    event = failed().encode()
    other = event.replace(b"GENERATION_FAILED", b"TIMEOUT")
    pipe = redis.pipeline()
    for number in range(1101):
        fields: dict[Any, Any] = {"event": other if number % 100 == 0 else event}
        pipe.xadd(keys.dead, fields, id=f"1767323045000-{number}")
    await pipe.execute()
    assert len(await list_dead(queue)) == 1101
    found = await list_dead(queue, error_code=ErrorCode.TIMEOUT)
    assert [letter.entry_id for letter in found] == [f"1767323045000-{number}" for number in range(0, 1101, 100)]
    assert await list_dead(queue, error_code=ErrorCode.TIMEOUT, limit=7) == found[:7]
    assert await list_dead(queue, limit=0) == []
    assert await list_dead(queue, error_code=ErrorCode.CUDA_OOM) == []


@pytest.mark.parametrize(
    "entry_id",
    [
        *("1767323045000-0", "no-id", "-", "+", "", "1767323045000", "(1-1", "١-١"),
        *(f"{2**64 - 1}-{2**64 - 1}", f"{2**64}-0", f"0-{2**64}"),
    ],
)
async def test_a_letter_that_is_not_there_is_unknown(queue: ProducerQueue, entry_id: str) -> None:
    with pytest.raises(JobUnknown):
        await show(queue, entry_id)
    assert await drop(queue, [entry_id]) == 0


async def test_dropping_removes_exactly_what_was_named(
    client: AsyncGenerationClient, queue: ProducerQueue, ann: FakeConsumer
) -> None:
    for job_id in ("job-1", "job-2", "job-3"):
        await a_dead_job(client, ann, job_id)
    first, second, third = await list_dead(queue)
    assert await drop(queue, [first.entry_id, third.entry_id, third.entry_id]) == 2
    assert await the_letter(queue) == second


async def test_a_replay_is_the_next_run_with_the_same_request_priority_and_a_fresh_signature(
    redis: Redis, keys: Keys, client: AsyncGenerationClient, queue: ProducerQueue, ann: FakeConsumer
) -> None:
    await client.submit(job_id="job-1", prompt="a red fox", seed=7, lora_url=f"{OWN}?old=1", priority=Priority.HIGH)
    await die(ann)
    letter = await the_letter(queue)
    [result] = await replay(client, queue, [letter])
    assert (result.verdict, result.job_id, result.run, result.reason) == (Verdict.REPLAYED, "job-1", 2, None)
    assert await list_dead(queue) == []
    [fields] = await waiting(redis, keys, Priority.HIGH)
    entry = decode_entry(fields)
    assert entry.run == 2
    assert entry.request is not None
    assert letter.request is not None
    assert entry.request.lora_url is not None
    assert entry.request.lora_url.startswith(f"{OWN}?")
    assert "X-Amz-Signature" in entry.request.lora_url
    assert entry.request.redacted() == letter.request
    assert await where_is(redis, keys) == ["stream"]


async def test_a_foreign_url_is_refused_and_the_letter_kept_until_a_fresh_one_is_given(
    redis: Redis, keys: Keys, client: AsyncGenerationClient, queue: ProducerQueue, ann: FakeConsumer
) -> None:
    await a_dead_job(client, ann, lora_url=f"{FOREIGN}?sig={CANARY}")
    letter = await the_letter(queue)
    for dry_run in (True, False):
        [result] = await replay(client, queue, [letter], dry_run=dry_run)
        assert result.verdict is Verdict.REFUSED
        assert "fresh" in (result.reason or "")
        assert CANARY not in repr(result)
    assert await the_letter(queue) == letter
    [result] = await replay(client, queue, [letter], changes={"lora_url": f"{FOREIGN}?sig=new"})
    assert result.verdict is Verdict.REPLAYED
    [fields] = await waiting(redis, keys)
    assert b"sig=new" in fields[b"payload"]


async def test_a_run_that_expired_is_refused_until_it_gets_another_time(
    redis: Redis, keys: Keys, client: AsyncGenerationClient, queue: ProducerQueue
) -> None:
    payload = b'{"job_id":"job-1","prompt":"x","expires_at":"2020-01-01T00:00:00Z"}'
    await redis.xadd(keys.dead, {b"job_id": b"job-1", b"run": b"1", b"payload": payload})
    letter = await the_letter(queue)
    [refused] = await replay(client, queue, [letter])
    assert (refused.verdict, refused.reason) == (Verdict.REFUSED, "expires_at has passed: give another")
    [result] = await replay(client, queue, [letter], changes={"expires_at": None})
    assert (result.verdict, result.run) == (Verdict.REPLAYED, 2)


@pytest.mark.parametrize("changes", [{"steps": 7}, {"run": 5}, {"priority": "high"}, {"request": None}])
@pytest.mark.parametrize("dry_run", [True, False])
async def test_changes_that_break_the_request_are_refused(
    client: AsyncGenerationClient, queue: ProducerQueue, ann: FakeConsumer, changes: dict[str, Any], dry_run: bool
) -> None:
    await a_dead_job(client, ann)
    [result] = await replay(client, queue, await list_dead(queue), changes=changes, dry_run=dry_run)
    assert result.verdict is Verdict.REFUSED
    assert len(await list_dead(queue)) == 1


async def test_changes_are_in_the_next_run(
    redis: Redis, keys: Keys, client: AsyncGenerationClient, queue: ProducerQueue, ann: FakeConsumer
) -> None:
    await a_dead_job(client, ann, seed=7, lora_url=f"{FOREIGN}?sig=old")
    changes = {"seed": 8, "lora_key": "loras/fox.safetensors"}
    [result] = await replay(client, queue, await list_dead(queue), changes=changes)
    assert result.verdict is Verdict.REPLAYED
    [fields] = await waiting(redis, keys)
    request = decode_entry(fields).request
    assert request is not None
    assert (request.seed, request.lora_key, request.lora_url) == (8, "loras/fox.safetensors", None)


async def test_a_replay_never_renames_jobs(
    client: AsyncGenerationClient, queue: ProducerQueue, ann: FakeConsumer
) -> None:
    await a_dead_job(client, ann)
    with pytest.raises(ValueError, match="keeps its job_id"):
        await replay(client, queue, await list_dead(queue), changes={"job_id": "job-2"})


async def test_a_dry_run_writes_nothing_at_all(
    redis: Redis, keys: Keys, client: AsyncGenerationClient, queue: ProducerQueue, ann: FakeConsumer
) -> None:
    for number in range(3):
        await a_dead_job(client, ann, f"job-{number}", lora_url=f"{OWN}?old=1")
    await client.resubmit("job-1")
    before = await everything(redis, keys)
    results = await replay(client, queue, await list_dead(queue), dry_run=True)
    assert [(result.verdict, result.run) for result in results] == [
        (Verdict.WOULD_REPLAY, 2),
        (Verdict.ALREADY, 2),
        (Verdict.WOULD_REPLAY, 2),
    ]
    assert await everything(redis, keys) == before


async def test_a_letter_replayed_twice_makes_one_run(
    redis: Redis, keys: Keys, client: AsyncGenerationClient, queue: ProducerQueue, ann: FakeConsumer
) -> None:
    await a_dead_job(client, ann)
    letter = await the_letter(queue)
    results = await replay(client, queue, [letter, letter])
    assert [(result.verdict, result.run) for result in results] == [(Verdict.REPLAYED, 2), (Verdict.ALREADY, 2)]
    assert len(await waiting(redis, keys)) == 1


class _Interrupted(ProducerQueue):
    """Dies where a replayed letter is to be removed."""

    async def drop_dead_letter(self, entry_id: str) -> bool:
        raise RedisConnectionError("gone")


@pytest.mark.parametrize("what_happens_then", ["waits", "succeeds", "dies again", "is forgotten and dies again"])
async def test_a_replay_that_was_interrupted_before_it_removed_the_letter_makes_no_second_run(
    redis: Redis,
    keys: Keys,
    client: AsyncGenerationClient,
    queue: ProducerQueue,
    ann: FakeConsumer,
    what_happens_then: str,
) -> None:
    await a_dead_job(client, ann)
    letter = await the_letter(queue)
    if what_happens_then.startswith("is forgotten"):
        await redis.delete(keys.job("job-1"))
    interrupted = _Interrupted(redis, keys, max_queue=100, job_ttl_s=600)
    with pytest.raises(RedisConnectionError):
        await replay(client, interrupted, [letter])
    assert (await job(redis, keys))["run"] == "2"
    if what_happens_then == "succeeds":
        lease, _ = await ann.take()
        event = failed("job-1", run=2)
        assert await ann.leases.finish(lease, JobState.SUCCEEDED, event, b"{}", dead=False) is Held.OK
    elif what_happens_then.endswith("dies again"):
        await die(ann, run=2)
    entries = await waiting(redis, keys)

    [result] = await replay(client, queue, [letter])
    assert (result.verdict, result.run) == (Verdict.ALREADY, 2)
    assert await waiting(redis, keys) == entries
    left = await list_dead(queue)
    assert [other.run for other in left] == ([2] if what_happens_then.endswith("dies again") else [])


async def test_poison_dies_again_as_a_letter_of_its_next_run_and_can_be_replayed_once_more(
    redis: Redis, keys: Keys, client: AsyncGenerationClient, queue: ProducerQueue, ann: FakeConsumer
) -> None:
    await a_dead_job(client, ann)
    for run in (2, 3, 4):
        [result] = await replay(client, queue, await list_dead(queue))
        assert (result.verdict, result.run) == (Verdict.REPLAYED, run)
        await die(ann, run=run)
        assert (await the_letter(queue)).run == run
    assert await where_is(redis, keys) == ["done"]


async def test_a_job_whose_hash_has_expired_goes_on_from_its_letter(
    redis: Redis, keys: Keys, client: AsyncGenerationClient, queue: ProducerQueue, ann: FakeConsumer
) -> None:
    await a_dead_job(client, ann, seed=7)
    await replay(client, queue, await list_dead(queue))
    await die(ann, run=2)
    await redis.delete(keys.job("job-1"))
    [result] = await replay(client, queue, await list_dead(queue))
    assert (result.verdict, result.run) == (Verdict.REPLAYED, 3)
    lease, begun = await ann.take()
    assert begun.verdict == "ok"
    entry = decode_entry(lease.delivery.fields)
    assert entry.run == 3
    assert entry.request is not None
    assert entry.request.seed == 7


async def test_a_letter_that_a_later_run_has_left_behind_goes_without_another_run(
    redis: Redis, keys: Keys, client: AsyncGenerationClient, queue: ProducerQueue, ann: FakeConsumer
) -> None:
    await a_dead_job(client, ann)
    for run in (2, 3):
        await client.resubmit("job-1")
        await die(ann, run=run)
    results = await replay(client, queue, await list_dead(queue))
    assert [(result.verdict, result.run) for result in results] == [
        (Verdict.ALREADY, 3),
        (Verdict.ALREADY, 3),
        (Verdict.REPLAYED, 4),
    ]
    assert results[0].reason == "run 3 is failed"
    assert await list_dead(queue) == []
    assert len(await waiting(redis, keys)) == 1


async def test_a_letter_of_an_id_that_has_expired_and_names_another_job_now_is_refused(
    client: AsyncGenerationClient, queue: ProducerQueue, ann: FakeConsumer, redis: Redis, keys: Keys
) -> None:
    await a_dead_job(client, ann)
    await replay(client, queue, await list_dead(queue))
    await die(ann, run=2)
    await redis.delete(keys.job("job-1"))
    await client.submit(job_id="job-1", prompt="a blue fox")
    [result] = await replay(client, queue, await list_dead(queue))
    assert result.verdict is Verdict.REFUSED
    assert (await the_letter(queue)).run == 2


async def test_a_letter_of_an_id_that_has_expired_and_died_again_as_another_job_is_refused(
    client: AsyncGenerationClient, queue: ProducerQueue, ann: FakeConsumer, redis: Redis, keys: Keys
) -> None:
    await a_dead_job(client, ann)
    await redis.delete(keys.job("job-1"))
    await client.submit(job_id="job-1", prompt="a blue fox")
    await die(ann, ErrorCode.TIMEOUT)
    old, new = await list_dead(queue)
    for dry_run in (True, False):
        [result] = await replay(client, queue, [old], dry_run=dry_run)
        assert (result.verdict, "another job's" in (result.reason or "")) == (Verdict.REFUSED, True)
    assert await list_dead(queue) == [old, new]
    [result] = await replay(client, queue, [new])
    assert (result.verdict, result.run) == (Verdict.REPLAYED, 2)


async def test_a_full_queue_refuses_the_replay_and_keeps_the_letter(
    redis_at: RedisServer, keys: Keys, client: AsyncGenerationClient, queue: ProducerQueue, ann: FakeConsumer
) -> None:
    await a_dead_job(client, ann)
    await client.submit(job_id="job-2", prompt="x")
    narrow = AsyncGenerationClient(redis_at.url, prefix=keys.prefix, max_queue=1, job_ttl_s=600)
    async with narrow:
        [result] = await replay(narrow, narrow.queue, await list_dead(queue))
    assert result.verdict is Verdict.REFUSED
    assert result.reason
    assert len(await list_dead(queue)) == 1
