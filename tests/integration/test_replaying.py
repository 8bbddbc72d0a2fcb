"""The replay of dead letters, as the consumer's own scripts write them, on a real Redis."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from pydantic import SecretStr
from redis.asyncio import Redis

from consumer.queue import Held
from demo.servers import RedisServer
from producer.client import AsyncGenerationClient
from producer.dead_letters import LetterFilter, Pace, Replayer, Verdict, drop, replay_each
from producer.dead_letters import replay as replay_letters
from producer.errors import RequestRefused
from producer.queue import ProducerQueue
from producer.settings import ProducerSettings
from producer.submissions import QueueLimits, Submitted
from schemas.entries import decode_entry
from schemas.errors import ErrorCode
from schemas.keys import JobState, Keys, Priority
from tests.event_kit import failed
from tests.integration.cli_kit import Cli
from tests.integration.client_kit import a_client
from tests.integration.letter_kit import (
    CANARY,
    FOREIGN,
    OWN,
    a_dead_job,
    a_lossy_redis,
    a_signing_client,
    die,
    every_letter,
    many_dead_jobs,
    replay,
    runs,
    the_letter,
    waiting,
)
from tests.integration.queue_kit import FakeConsumer, where_is


@pytest.fixture
async def client(redis_at: RedisServer, keys: Keys) -> AsyncIterator[AsyncGenerationClient]:
    async with a_signing_client(redis_at.url, keys) as made:
        yield made


@pytest.fixture
def queue(client: AsyncGenerationClient) -> ProducerQueue:
    return client.queue


async def everything(redis: Redis, keys: Keys) -> dict[bytes, bytes | None]:
    """Every value of this test, byte for byte."""
    names = [name async for name in redis.scan_iter(match=f"{{{keys.prefix}}}:*")]
    return {name: await redis.dump(name) for name in sorted(names)}


async def test_a_replay_is_the_next_run_with_the_same_request_priority_and_a_fresh_signature(
    redis: Redis, keys: Keys, client: AsyncGenerationClient, queue: ProducerQueue, ann: FakeConsumer
) -> None:
    await client.submit(job_id="job-1", prompt="a red fox", seed=7, lora_url=f"{OWN}?old=1", priority=Priority.HIGH)
    await die(ann)
    letter = await the_letter(queue)
    [result] = await replay(client, [letter])
    assert (result.verdict, result.job_id, result.run, result.reason) == (Verdict.REPLAYED, "job-1", 2, None)
    assert await every_letter(queue) == []
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
        [result] = await replay(client, [letter], dry_run=dry_run)
        assert result.verdict is Verdict.REFUSED
        assert "fresh" in (result.reason or "")
        assert CANARY not in repr(result)
    assert await the_letter(queue) == letter
    [result] = await replay(client, [letter], changes={"lora_url": f"{FOREIGN}?sig=new"})
    assert result.verdict is Verdict.REPLAYED
    [fields] = await waiting(redis, keys)
    assert b"sig=new" in fields[b"payload"]


async def test_a_run_that_expired_is_refused_until_it_gets_another_time(
    redis: Redis, keys: Keys, client: AsyncGenerationClient, queue: ProducerQueue
) -> None:
    payload = b'{"job_id":"job-1","prompt":"x","expires_at":"2020-01-01T00:00:00Z"}'
    await redis.xadd(keys.dead, {b"job_id": b"job-1", b"run": b"1", b"payload": payload})
    letter = await the_letter(queue)
    [refused] = await replay(client, [letter])
    assert (refused.verdict, refused.reason) == (Verdict.REFUSED, "expires_at has passed: give another")
    [result] = await replay(client, [letter], changes={"expires_at": None})
    assert (result.verdict, result.run) == (Verdict.REPLAYED, 2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 7}, "steps: Input should be greater"),
        ({"run": 5}, "run: Extra"),
        ({"priority": "high"}, "priority"),
        ({"request": None}, "request"),
        ({"prompt": " "}, "prompt: is blank"),
        ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at has passed"),
        ({"lora_key": "a", "lora_url": FOREIGN}, "lora_url excludes lora_key"),
        ({"seed": object()}, "cannot be written as JSON"),
        ({"job_id": "job-2"}, "keeps its job_id"),
    ],
)
async def test_changes_that_no_request_can_take_are_refused_before_anything_is_replayed(
    client: AsyncGenerationClient, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(RequestRefused, match=said) as caught:
        Replayer(client.queue, changes=changes)
    assert caught.value.job_id is None


async def test_a_change_that_does_not_fit_one_letter_is_refused_for_this_one(
    client: AsyncGenerationClient, queue: ProducerQueue, ann: FakeConsumer
) -> None:
    await a_dead_job(client, ann, "job-1", output_key="out/1.png")
    await a_dead_job(client, ann, "job-2", tenant="x" * 50_000)
    too_long_together = {"prompt": "🦊" * 4000}
    results = await replay(client, await every_letter(queue), changes=too_long_together)
    verdicts = {result.job_id: result.verdict for result in results}
    assert verdicts == {"job-1": Verdict.REPLAYED, "job-2": Verdict.REFUSED}
    assert [letter.job_id for letter in await every_letter(queue)] == ["job-2"]


async def test_changes_are_in_the_next_run(
    redis: Redis, keys: Keys, client: AsyncGenerationClient, queue: ProducerQueue, ann: FakeConsumer
) -> None:
    await a_dead_job(client, ann, seed=7, lora_url=f"{FOREIGN}?sig=old")
    changes = {"seed": 8, "lora_key": "loras/fox.safetensors"}
    [result] = await replay(client, await every_letter(queue), changes=changes)
    assert result.verdict is Verdict.REPLAYED
    [fields] = await waiting(redis, keys)
    request = decode_entry(fields).request
    assert request is not None
    assert (request.seed, request.lora_key, request.lora_url) == (8, "loras/fox.safetensors", None)


async def test_a_dry_run_writes_nothing_at_all(
    redis: Redis, keys: Keys, client: AsyncGenerationClient, queue: ProducerQueue, ann: FakeConsumer
) -> None:
    for number in range(3):
        await a_dead_job(client, ann, f"job-{number}", lora_url=f"{OWN}?old=1")
    await client.resubmit("job-1")
    before = await everything(redis, keys)
    results = await replay(client, await every_letter(queue), dry_run=True)
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
    results = await replay(client, [letter, letter])
    assert [(result.verdict, result.run) for result in results] == [(Verdict.REPLAYED, 2), (Verdict.GONE, None)]
    assert len(await waiting(redis, keys)) == 1


async def test_poison_dies_again_as_a_letter_of_its_next_run_and_can_be_replayed_once_more(
    redis: Redis, keys: Keys, client: AsyncGenerationClient, queue: ProducerQueue, ann: FakeConsumer
) -> None:
    await a_dead_job(client, ann)
    for run in (2, 3, 4):
        [result] = await replay(client, await every_letter(queue))
        assert (result.verdict, result.run) == (Verdict.REPLAYED, run)
        await die(ann, run=run)
        assert (await the_letter(queue)).run == run
    assert await where_is(redis, keys) == ["done"]


async def test_a_job_whose_hash_has_expired_goes_on_from_its_letter(
    redis: Redis, keys: Keys, client: AsyncGenerationClient, queue: ProducerQueue, ann: FakeConsumer
) -> None:
    await a_dead_job(client, ann, seed=7)
    await replay(client, await every_letter(queue))
    await die(ann, run=2)
    await redis.delete(keys.job("job-1"))
    [result] = await replay(client, await every_letter(queue))
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
    results = await replay(client, await every_letter(queue))
    assert [(result.verdict, result.run) for result in results] == [
        (Verdict.ALREADY, 3),
        (Verdict.ALREADY, 3),
        (Verdict.REPLAYED, 4),
    ]
    assert results[0].reason == "run 3 is failed"
    assert await every_letter(queue) == []
    assert len(await waiting(redis, keys)) == 1


async def test_a_letter_of_an_id_that_has_expired_and_names_another_job_now_is_refused(
    client: AsyncGenerationClient, queue: ProducerQueue, ann: FakeConsumer, redis: Redis, keys: Keys
) -> None:
    await a_dead_job(client, ann)
    await replay(client, await every_letter(queue))
    await die(ann, run=2)
    await redis.delete(keys.job("job-1"))
    await client.submit(job_id="job-1", prompt="a blue fox")
    [result] = await replay(client, await every_letter(queue))
    assert result.verdict is Verdict.REFUSED
    assert (await the_letter(queue)).run == 2


async def test_a_letter_of_an_id_that_has_expired_and_died_again_as_another_job_is_refused(
    client: AsyncGenerationClient, queue: ProducerQueue, ann: FakeConsumer, redis: Redis, keys: Keys
) -> None:
    await a_dead_job(client, ann)
    await redis.delete(keys.job("job-1"))
    await client.submit(job_id="job-1", prompt="a blue fox")
    await die(ann, ErrorCode.TIMEOUT)
    old, new = await every_letter(queue)
    for dry_run in (True, False):
        [result] = await replay(client, [old], dry_run=dry_run)
        assert (result.verdict, "another job's" in (result.reason or "")) == (Verdict.REFUSED, True)
    assert await every_letter(queue) == [old, new]
    [result] = await replay(client, [new])
    assert (result.verdict, result.run) == (Verdict.REPLAYED, 2)


async def test_a_letter_of_an_id_that_is_another_jobs_now_is_refused_whatever_that_one_does(
    client: AsyncGenerationClient, queue: ProducerQueue, ann: FakeConsumer, redis: Redis, keys: Keys
) -> None:
    await a_dead_job(client, ann)
    await redis.delete(keys.job("job-1"))
    await client.submit(job_id="job-1", prompt="a blue fox")
    letter = await the_letter(queue)
    [waits] = await replay(client, [letter])
    lease, _ = await ann.take()
    assert await ann.leases.finish(lease, JobState.SUCCEEDED, failed(), b"{}", dead=False) is Held.OK
    [succeeded] = await replay(client, [letter])
    assert [waits.verdict, succeeded.verdict] == [Verdict.REFUSED] * 2
    assert await the_letter(queue) == letter


async def test_a_letter_that_was_dropped_while_others_were_replayed_makes_no_run(
    redis: Redis, keys: Keys, client: AsyncGenerationClient, queue: ProducerQueue, ann: FakeConsumer
) -> None:
    for job_id in ("job-1", "job-2"):
        await a_dead_job(client, ann, job_id)
    first, second = await every_letter(queue)
    verdicts = []
    async for result in replay_each(Replayer(queue), [first.entry_id, second.entry_id]):
        verdicts.append(result.verdict)
        await drop(queue, [second.entry_id])
    assert verdicts == [Verdict.REPLAYED, Verdict.GONE]
    assert await runs(redis, keys) == [("job-1", "2")]


class _Overtaken(ProducerQueue):
    """Somebody else does something between the look at a job and its submission."""

    def __init__(self, redis: Redis, keys: Keys, other: Callable[[str], Awaitable[object]]) -> None:
        super().__init__(redis, keys, limits=QueueLimits(100), job_ttl_s=600)
        self._other = other

    async def replay(self, letter_id: str, *args: Any, **options: Any) -> Submitted:
        await self._other(letter_id)
        return await super().replay(letter_id, *args, **options)


@pytest.mark.parametrize("changes", [{}, {"seed": 8}], ids=["the same", "with other changes"])
@pytest.mark.parametrize("left_behind", [False, True], ids=["replayed", "resubmitted"])
async def test_who_is_overtaken_by_another_replay_finds_that_it_is_done_already(
    redis: Redis,
    keys: Keys,
    client: AsyncGenerationClient,
    queue: ProducerQueue,
    ann: FakeConsumer,
    changes: dict[str, Any],
    left_behind: bool,
) -> None:
    async def other(letter_id: str) -> None:
        if left_behind:  # the client's own way leaves the letter
            await client.resubmit("job-1", **changes)
        else:
            await Replayer(queue, changes=changes).replay(letter_id)

    await a_dead_job(client, ann)
    overtaken = _Overtaken(redis, keys, other)
    result = await Replayer(overtaken).replay((await the_letter(queue)).entry_id)
    assert (result.verdict, result.run) == (Verdict.ALREADY, 2)
    assert await runs(redis, keys) == [("job-1", "2")]
    assert await every_letter(queue) == []


async def test_a_letter_that_is_dropped_at_the_last_moment_makes_no_run(
    redis: Redis, keys: Keys, client: AsyncGenerationClient, queue: ProducerQueue, ann: FakeConsumer
) -> None:
    await a_dead_job(client, ann)
    overtaken = _Overtaken(redis, keys, lambda letter_id: drop(queue, [letter_id]))
    result = await Replayer(overtaken).replay((await the_letter(queue)).entry_id)
    assert (result.verdict, result.run) == (Verdict.GONE, None)
    assert await runs(redis, keys) == []


@pytest.mark.parametrize("forgotten", [False, True])
async def test_a_reply_that_is_lost_after_the_run_was_submitted_makes_no_second_run(
    redis_at: RedisServer,
    redis: Redis,
    keys: Keys,
    client: AsyncGenerationClient,
    queue: ProducerQueue,
    ann: FakeConsumer,
    forgotten: bool,
) -> None:
    for job_id in ("job-1", "job-2"):
        await a_dead_job(client, ann, job_id)
    if forgotten:
        await redis.delete(keys.job("job-2"))
    first, second = [letter.entry_id for letter in await every_letter(queue)]
    async with a_lossy_redis(redis_at.port) as lossy, a_client(lossy.url, keys) as weak:
        replayer = Replayer(weak.queue)
        assert (await replayer.replay(first)).verdict is Verdict.REPLAYED  # the server knows the script from here on
        lossy.lose = b"EVALSHA"
        result = await replayer.replay(second)
    assert lossy.lost == 1
    assert (result.verdict, result.run) == (Verdict.ALREADY, 2)
    assert await runs(redis, keys) == [("job-1", "2"), ("job-2", "2")]
    assert await every_letter(queue) == []


async def test_a_full_queue_ends_the_replay_and_keeps_the_letters(
    redis_at: RedisServer, redis: Redis, keys: Keys, client: AsyncGenerationClient, ann: FakeConsumer
) -> None:
    for number in range(5):
        await a_dead_job(client, ann, f"job-{number}")
    letters = await every_letter(client.queue)
    async with a_client(redis_at.url, keys, max_queue=2) as narrow:
        results = await replay(narrow, letters)
    assert [result.verdict for result in results] == [Verdict.REPLAYED, Verdict.REPLAYED, Verdict.QUEUE_FULL]
    assert (results[2].reason, results[2].retry_after) == ("2 jobs are waiting already", 1)
    assert await every_letter(client.queue) == letters[2:]
    assert [result.verdict for result in await replay(client, letters)] == [
        *[Verdict.GONE] * 2,
        *[Verdict.REPLAYED] * 3,
    ]
    assert len(await runs(redis, keys)) == 5


async def test_only_what_was_replayed_takes_a_turn(
    client: AsyncGenerationClient, queue: ProducerQueue, ann: FakeConsumer
) -> None:
    for number, url in enumerate((None, FOREIGN, None, None)):
        await a_dead_job(client, ann, f"job-{number}", lora_url=url)
    slept_s: list[float] = []

    async def sleep(seconds: float) -> None:
        slept_s.append(seconds)

    entry_ids = [letter.entry_id for letter in await every_letter(queue)]
    pace = Pace(0.5, clock=lambda: 0.0, sleep=sleep)
    results = [result.verdict async for result in replay_each(Replayer(queue), entry_ids, pace)]
    assert results == [Verdict.REPLAYED, Verdict.REFUSED, Verdict.REPLAYED, Verdict.REPLAYED]
    assert slept_s == [2.0, 2.0, 2.0]  # before each of the others: this clock stands still


def test_the_plain_function_does_what_it_is_asked_and_no_more(cli: Cli) -> None:
    cli.consume(lambda ann: many_dead_jobs(ann.redis, ann.keys, 5))
    settings = ProducerSettings(redis_url=SecretStr(cli.environment["REDIS_URL"]), prefix=cli.keys.prefix)
    [would] = replay_letters(settings, where=LetterFilter(job_id="job-3"), dry_run=True)
    assert (would.verdict, cli.consume(runs_of)) == (Verdict.WOULD_REPLAY, [])
    results = replay_letters(settings, where=LetterFilter(), changes={"steps": 40}, limit=2, rate_per_s=1000)
    assert [(result.job_id, result.verdict) for result in results] == [
        ("job-0", Verdict.REPLAYED),
        ("job-1", Verdict.REPLAYED),
    ]
    with pytest.raises(ValueError, match="above 0"):
        replay_letters(settings, where=LetterFilter(), rate_per_s=0)
    with pytest.raises(RequestRefused, match="steps"):
        replay_letters(settings, where=LetterFilter(), changes={"steps": 7})
    assert cli.consume(runs_of) == [("job-0", "2"), ("job-1", "2")]


async def runs_of(ann: FakeConsumer) -> list[tuple[str, str]]:
    return await runs(ann.redis, ann.keys)
