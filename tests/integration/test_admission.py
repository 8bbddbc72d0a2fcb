"""Who is let in, on a real Redis: the queue's limit, a tenant's, and that of events which nobody has heard."""

from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from demo.servers import RedisServer, redis_server
from producer.client import AsyncGenerationClient
from producer.completions import Completions
from producer.dead_letters import Replayer, Verdict
from producer.errors import ProducerError, QueueFull
from producer.jobs import Job
from schemas.keys import ENDED_MAX_ENTRIES, Keys, Priority
from tests import event_kit
from tests.integration.cli_kit import Cli
from tests.integration.client_kit import Ender, a_client, a_redis
from tests.integration.queue_kit import a_request, let_lease_run_out, publish, retrying


async def submit(client: AsyncGenerationClient, job_id: str, tenant: str | None = None) -> Job:
    return await client.submit(job_id=job_id, prompt="a fox", tenant=tenant)


async def refused(client: AsyncGenerationClient, job_id: str, tenant: str | None = None) -> QueueFull:
    with pytest.raises(QueueFull) as caught:
        await submit(client, job_id, tenant)
    assert caught.value.job_id == job_id
    return caught.value


async def unfinished(redis: Redis, keys: Keys) -> dict[str, int]:
    """What the tenants are counted with."""
    raw: Any = await redis.hgetall(keys.tenants)
    return {tenant.decode(): int(count) for tenant, count in raw.items()}


async def ended_ago(redis: Redis, keys: Keys, *ages_s: float) -> None:
    """Runs ended so long ago, by the server's clock."""
    seconds, _ = await redis.time()
    for age_s in sorted(ages_s, reverse=True):
        await redis.lpush(keys.ended, str(int((seconds - age_s) * 1000)))


async def test_the_ends_of_the_newest_runs_are_kept_and_no_others(
    redis: Redis, keys: Keys, client: AsyncGenerationClient, ann: Ender
) -> None:
    """Guards LPUSH and LTRIM in END_RUN, and that a cancellation is an end as well."""
    await ended_ago(redis, keys, *range(1000, 1000 + ENDED_MAX_ENTRIES))
    await submit(client, "succeeds")
    await submit(client, "cancelled")
    await ann.succeed_next()
    await client.cancel("cancelled")
    ended_ms: list[int] = [int(at) for at in await redis.lrange(keys.ended, 0, -1)]
    assert len(ended_ms) == ENDED_MAX_ENTRIES
    seconds, _ = await redis.time()
    assert [seconds * 1000 - at < 60_000 for at in ended_ms[:3]] == [True, True, False]


@pytest.mark.parametrize(
    ("ages_s", "earliest", "latest"),
    [
        ([], 30, 30),
        ([5], 30, 30),
        ([2000, 1000, 700], 30, 30),
        ([2000, *range(10, 101, 10)], 11, 13),
        (range(50, 1100, 100), 110, 130),
    ],
    ids=["nothing ended", "one end is no rate", "long ago", "nine after the first, in 100 s", "five, in 550 s"],
)
async def test_a_full_queue_says_when_a_place_is_free_at_the_rate_of_the_last_ten_minutes(
    redis_at: RedisServer, redis: Redis, keys: Keys, ages_s: list[int], earliest: int, latest: int
) -> None:
    """Guards `ends_lately` of SUBMIT: LRANGE, and the window."""
    await ended_ago(redis, keys, *ages_s)
    async with a_client(redis_at.url, keys, max_queue=10) as client:
        for number in range(10):
            await submit(client, f"job-{number}")
        error = await refused(client, "late")
    assert error.details == {"limit": "queue"}
    assert error.retry_after is not None
    assert earliest <= error.retry_after <= latest


async def test_a_tenants_runs_are_limited_and_nobody_elses(redis_at: RedisServer, redis: Redis, keys: Keys) -> None:
    """Guards the `tenant_full` branch of SUBMIT."""
    async with a_client(redis_at.url, keys, per_tenant=2) as client:
        await submit(client, "a1", "ann")
        await submit(client, "a2", "ann")
        error = await refused(client, "a3", "ann")
        assert (error.details, error.retry_after) == ({"limit": "tenant"}, 30)
        assert str(error) == "2 jobs of its tenant are unfinished already"
        assert (await submit(client, "a1", "ann")).duplicate
        await submit(client, "b1", "bob")
        await submit(client, "n1")
        await submit(client, "n2")
        await submit(client, "n3")
    assert await unfinished(redis, keys) == {"ann": 2, "bob": 1}
    assert await redis.exists(keys.job("a3")) == 0


async def test_a_redis_without_memory_refuses_a_run_before_its_tenant_is_counted(tmp_path: Path, keys: Keys) -> None:
    """Guards the order in SUBMIT: the XADD is its first write. An end goes through all the same, and gives back."""
    with redis_server(tmp_path) as server:
        async with a_redis(server.url) as redis, a_client(server.url, keys, per_tenant=2) as client:
            ann = Ender(redis, keys, "ann")
            await submit(client, "a1", "ann")
            lease, delivery = await ann.run_next()
            await redis.config_set("maxmemory", "1")
            with pytest.raises(ResponseError, match="OOM"):
                await submit(client, "a2", "ann")
            assert await unfinished(redis, keys) == {"ann": 1}
            assert await redis.exists(keys.job("a2")) == 0
            await ann.succeed(lease, delivery)
            assert await unfinished(redis, keys) == {}
            assert await redis.llen(keys.ended) == 1


async def test_of_a_batch_as_many_are_taken_as_there_are_places(redis_at: RedisServer, keys: Keys) -> None:
    async with a_client(redis_at.url, keys, per_tenant=3) as client:
        requests: list[dict[str, Any]] = [{"prompt": "a fox", "tenant": "ann"}] * 5
        outcomes: list[Job | ProducerError] = await client.submit_many(requests)
    assert [type(outcome) for outcome in outcomes] == [Job] * 3 + [QueueFull] * 2


async def test_whoever_ends_a_run_gives_its_place_back_once(
    redis: Redis, keys: Keys, client: AsyncGenerationClient, ann: Ender
) -> None:
    """Guards the HINCRBY and HDEL of END_RUN, and that FINISH and CANCEL_WAITING end a run once."""
    for job_id in ("succeeds", "fails", "cancelled", "stays"):
        await submit(client, job_id, "ann")
    lease, delivery = await ann.run_next()
    event = await ann.succeed(lease, delivery)
    await ann.end(lease, delivery, event)  # the same call again, whose reply was lost
    assert await unfinished(redis, keys) == {"ann": 3}
    await ann.fail_next()
    assert await unfinished(redis, keys) == {"ann": 2}
    await client.cancel("cancelled")
    await client.cancel("cancelled")
    assert await unfinished(redis, keys) == {"ann": 1}
    await client.cancel("stays")
    assert await redis.exists(keys.tenants) == 0


async def test_a_run_that_is_delayed_handed_back_or_taken_over_keeps_its_place(
    redis: Redis, keys: Keys, client: AsyncGenerationClient, ann: Ender, bob: Ender
) -> None:
    """One place for a run, however many attempts it takes."""
    await submit(client, "job-1", "ann")
    lease, _ = await ann.run_next()
    await ann.leases.retry(lease, retrying(lease), 0)
    assert await ann.intake.promote() == 1
    lease, delivery = await ann.take_next()
    await let_lease_run_out(redis, keys, delivery, "ann")
    [taken] = await bob.intake.reclaim(())
    lease, _ = await bob.begin(taken)
    await bob.leases.release(lease)
    assert await unfinished(redis, keys) == {"ann": 1}
    [taken] = await ann.intake.reclaim(())
    await ann.succeed((await ann.begin(taken))[0], taken)
    assert await unfinished(redis, keys) == {}


async def test_runs_of_a_bare_xadd_are_not_counted_and_give_nothing_back(
    redis_at: RedisServer, redis: Redis, keys: Keys, ann: Ender
) -> None:
    """Guards the condition in END_RUN: only the hash of a run that was counted says so, not that of the one after."""
    async with a_client(redis_at.url, keys, per_tenant=1) as client:
        await submit(client, "other", "ann")
        lease, delivery = await ann.run_next()
        await publish(redis, keys, a_request("job-1", tenant="ann"))
        await ann.succeed_next()
        assert await unfinished(redis, keys) == {"ann": 1}
        await ann.succeed(lease, delivery)
    async with a_client(redis_at.url, keys) as client:
        await submit(client, "job-2", "ann")
        await client.cancel("job-2")
        await submit(client, "job-3", "ann")
        await publish(redis, keys, a_request("job-2", tenant="ann"), Priority.HIGH, run=2)
        await ann.succeed_next(run=2)
    assert await unfinished(redis, keys) == {"ann": 1}


async def test_the_next_run_of_a_job_takes_a_place_of_its_own(redis_at: RedisServer, keys: Keys) -> None:
    async with a_client(redis_at.url, keys, per_tenant=1) as client:
        await submit(client, "job-1", "ann")
        await client.cancel("job-1")
        await submit(client, "job-2", "ann")
        with pytest.raises(QueueFull):
            await client.resubmit("job-1")
        await client.cancel("job-2")
        assert (await client.resubmit("job-1")).run == 2
        await refused(client, "job-3", "ann")


async def test_a_replay_passes_over_a_tenant_without_room_and_goes_on(
    redis_at: RedisServer, redis: Redis, keys: Keys, ann: Ender
) -> None:
    """Guards the verdict in Replayer: QUEUE_FULL would end the replay of everybody's."""
    async with a_client(redis_at.url, keys, per_tenant=1) as client:
        for job_id, tenant in (("a1", "ann"), ("a2", "ann"), ("b1", "bob")):
            await submit(client, job_id, tenant)
            await ann.fail_next()
        letters = await client.queue.dead_letters()
        results = [await Replayer(client.queue).replay(letter.entry_id) for letter in letters]
        left = await client.queue.dead_letters()
    assert [result.verdict for result in results] == [Verdict.REPLAYED, Verdict.REFUSED, Verdict.REPLAYED]
    assert (results[1].reason, results[1].retry_after) == ("1 jobs of its tenant are unfinished already", 1)
    assert [letter.entry_id for letter in left] == [letters[1].entry_id]
    assert await unfinished(redis, keys) == {"ann": 1, "bob": 1}


async def test_a_tenants_places_drain_at_its_share_of_the_rate(redis_at: RedisServer, redis: Redis, keys: Keys) -> None:
    """Half of what waits is the tenant's: of ten ends in 100 s, five."""
    await ended_ago(redis, keys, *range(10, 101, 10))
    async with a_client(redis_at.url, keys, per_tenant=4) as client:
        for number in range(4):
            await submit(client, f"a{number}", "ann")
            await submit(client, f"b{number}", "bob")
        error = await refused(client, "late", "ann")
    assert error.retry_after is not None
    assert 20 <= error.retry_after <= 25


async def unheard_events(redis: Redis, keys: Keys, count: int) -> None:
    for _ in range(count):
        await redis.xadd(keys.completions, {"payload": event_kit.started().encode()})


async def test_events_that_a_group_has_not_heard_keep_new_runs_out_and_it_is_named(
    redis_at: RedisServer, redis: Redis, keys: Keys
) -> None:
    """Guards the `unheard` branch of SUBMIT, and that the group with the oldest need is the one."""
    await unheard_events(redis, keys, 9)
    quick = Completions(redis, redis, keys, "quick", "ann")
    slow = Completions(redis, redis, keys, "slow", "bob")
    await quick.ensure_group()
    await slow.ensure_group()
    await quick.ack([entry.entry_id for entry in await quick.read(block_ms=1)])
    pending = [entry.entry_id for entry in await slow.read(block_ms=1)]
    async with a_client(redis_at.url, keys, completions=10) as client:
        await submit(client, "job-1")
        await unheard_events(redis, keys, 1)
        error = await refused(client, "job-2")
        assert (error.details, error.retry_after) == ({"limit": "completions", "group": "slow"}, 60)
        assert str(error) == "10 events are kept that the group slow has not acknowledged"
        assert (await submit(client, "job-1")).duplicate
        await slow.ack(pending[1:])
        await refused(client, "job-2")
        await slow.ack(pending[:1])
        await submit(client, "job-2")
    assert await redis.xlen(keys.completions) == 2  # the last that both have acknowledged, and the new one


async def test_events_that_nobody_listens_for_keep_new_runs_out_too(
    redis_at: RedisServer, redis: Redis, keys: Keys
) -> None:
    await unheard_events(redis, keys, 3)
    async with a_client(redis_at.url, keys, completions=3) as client:
        error = await refused(client, "job-1")
    assert (str(error), error.details) == ("3 events are kept that nobody listens for", {"limit": "completions"})
    assert await redis.xlen(keys.completions) == 3


def test_dropping_the_group_that_is_behind_lets_new_runs_in(cli: Cli) -> None:
    """The command line's way out of it, without a listener at hand."""

    async def two_groups(ann: Ender) -> None:
        await unheard_events(ann.redis, ann.keys, 5)
        quick = Completions(ann.redis, ann.redis, ann.keys, "quick", "ann")
        await quick.ensure_group()
        await quick.ack([entry.entry_id for entry in await quick.read(block_ms=1)])
        await Completions(ann.redis, ann.redis, ann.keys, "forgotten", "bob").ensure_group()

    cli.consume(two_groups)
    full = cli.run_json("publish", "a fox", SDXL_MAX_COMPLETIONS="5")
    assert (cli.status, full["error"]["error_code"], full["error"]["retry_after"]) == (1, "QUEUE_FULL", 60)
    assert full["error"]["details"] == {"limit": "completions", "group": "forgotten"}
    cli.run("listen", "--drop-group", "forgotten")
    cli.run("publish", "a fox", SDXL_MAX_COMPLETIONS="5")
    assert cli.status == 0
