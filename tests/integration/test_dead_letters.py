"""Dead letters as the consumer's own scripts write them, found, shown and dropped, on a real Redis."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from redis.asyncio import Redis

from consumer.queue import Held
from demo.servers import RedisServer
from producer.client import AsyncGenerationClient
from producer.dead_letters import LetterFilter, Verdict, drop, show
from producer.errors import JobUnknown
from producer.queue import ProducerQueue
from schemas.errors import ErrorCode
from schemas.keys import Keys, Priority
from tests.event_kit import failed
from tests.integration.letter_kit import (
    CANARY,
    OWN,
    a_dead_job,
    a_signing_client,
    die,
    every_letter,
    replay,
    the_letter,
)
from tests.integration.queue_kit import FakeConsumer, add


@pytest.fixture
async def client(redis_at: RedisServer, keys: Keys) -> AsyncIterator[AsyncGenerationClient]:
    async with a_signing_client(redis_at.url, keys) as made:
        yield made


@pytest.fixture
def queue(client: AsyncGenerationClient) -> ProducerQueue:
    return client.queue


TIMEOUT = LetterFilter(error_codes=(ErrorCode.TIMEOUT,))


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
    assert (letter.error_code, letter.error) == (None, None)
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
    assert letter == (await every_letter(queue))[0]
    assert letter.died_at.tzinfo is UTC
    [result] = await replay(client, [letter])
    assert (result.verdict, result.entry_id) == (Verdict.UNDECODABLE, entry_id)
    assert await redis.xlen(keys.dead) == 1


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
    assert len(await every_letter(queue)) == 1101
    found = await every_letter(queue, TIMEOUT)
    assert [letter.entry_id for letter in found] == [f"1767323045000-{number}" for number in range(0, 1101, 100)]
    assert await every_letter(queue, TIMEOUT, limit=7) == found[:7]
    assert await every_letter(queue, limit=0) == []
    assert await every_letter(queue, LetterFilter(error_codes=(ErrorCode.CUDA_OOM,))) == []


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
    first, second, third = await every_letter(queue)
    assert await drop(queue, [first.entry_id, third.entry_id, third.entry_id]) == 2
    assert await the_letter(queue) == second
