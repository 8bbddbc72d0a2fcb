"""Who waits for a job, who leaves, and what a key does: the last to leave a synchronous call's job cancels it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import httpx
import pytest
from redis.asyncio import Redis

from producer.client import AsyncGenerationClient
from producer.gateway import create_app
from producer.gateway.tasks import Background, stop
from producer.gateway.waiters import Waiters
from producer.queue import JobRecord, ProducerQueue
from producer.settings import ProducerSettings
from producer.submissions import QueueLimits
from schemas.errors import ErrorCode
from schemas.keys import Keys, Priority
from schemas.requests import decode_request
from tests.integration.client_kit import begun, until
from tests.integration.gateway_kit import PROMPT, Painter, calling, only_job_id, state_of, waiters_of
from tests.integration.queue_kit import completions, entries, job

KEY = {"Idempotency-Key": "order-1"}
SHORT = {**PROMPT, "timeout": 1}


async def until_waiting(redis: Redis, keys: Keys, job_id: str, count: int = 1) -> None:
    async def so_many() -> bool:
        return await waiters_of(redis, keys, job_id) == count and await state_of(redis, keys, job_id) is not None

    await until(so_many)


async def until_state(redis: Redis, keys: Keys, job_id: str, state: str) -> None:
    async def there() -> bool:
        return await state_of(redis, keys, job_id) == state

    await until(there)


async def marked(redis: Redis, keys: Keys, job_id: str) -> None:
    async def by_a_caller() -> bool:
        return (await job(redis, keys, job_id)).get("caller") == "waits"

    await until(by_a_caller)


@asynccontextmanager
async def hanging(http: httpx.AsyncClient, **options: str) -> AsyncIterator[asyncio.Task[httpx.Response]]:
    """A call on a connection of its own; cancelling it closes the connection."""
    headers = {**http.headers, **options}
    async with httpx.AsyncClient(base_url=http.base_url, headers=headers, timeout=30) as alone:
        call = begun(alone.post("/generate-image", json=PROMPT))
        try:
            yield call
        finally:
            call.cancel()
            await asyncio.wait({call})


async def hang_up(call: asyncio.Task[httpx.Response]) -> None:
    call.cancel()
    await asyncio.wait({call})


async def test_a_call_that_nobody_serves_is_504_and_its_job_is_cancelled(
    http: httpx.AsyncClient, redis: Redis, keys: Keys
) -> None:
    answer = await http.post("/generate-image", json=SHORT)
    found = answer.json()
    assert (answer.status_code, found["error_code"], found["retry_after"]) == (504, "TIMEOUT", 0)
    assert await state_of(redis, keys, found["job_id"]) == "cancelled"
    assert await entries(redis, keys.requests(Priority.HIGH)) == []
    assert [event["data"]["stage"] for event in await completions(redis, keys)] == ["queued"]


async def test_no_call_lasts_longer_than_the_gateways_limit(
    gateway_env: ProducerSettings, painter: Painter, redis: Redis, keys: Keys
) -> None:
    async with calling(create_app(gateway_env, limit_s=1.5)) as http:
        call = begun(http.post("/generate-image", json={**PROMPT, "timeout": 300}))
        lease, delivery = await painter.run_one()
        answer = await call
    assert (answer.status_code, answer.json()["job_id"]) == (504, lease.job_id)
    request = decode_request(delivery.fields[b"payload"])
    assert request.timeout == 1
    assert await redis.exists(keys.cancel(lease.job_id))  # the consumer that has it is asked to stop


async def test_closing_the_connection_cancels_a_job_that_waits(
    http: httpx.AsyncClient, redis: Redis, keys: Keys
) -> None:
    async with hanging(http) as call:
        job_id = await only_job_id(redis, keys)
        await marked(redis, keys, job_id)
        await hang_up(call)
        await until_state(redis, keys, job_id, "cancelled")


async def test_closing_the_connection_asks_the_consumer_of_a_running_job_to_stop(
    http: httpx.AsyncClient, painter: Painter, redis: Redis, keys: Keys
) -> None:
    async with hanging(http) as call:
        lease, _ = await painter.run_one()
        await marked(redis, keys, lease.job_id)
        await hang_up(call)
        await until(lambda: _exists(redis, keys.cancel(lease.job_id)))
        assert await painter.leases.progress(lease, 1, 20, 1.0) == "cancel"


async def _exists(redis: Redis, key: str) -> bool:
    return bool(await redis.exists(key))


async def test_a_wake_that_hangs_keeps_no_call_that_ends_from_cancelling_its_job(
    gateway_env: ProducerSettings, redis: Redis, keys: Keys
) -> None:
    async def hang() -> None:
        await asyncio.sleep(3)

    async with calling(create_app(gateway_env, wake=hang)) as http:
        answer = await http.post("/generate-image", json=SHORT, headers=KEY)
        assert answer.status_code == 504
        await until_state(redis, keys, "order-1", "cancelled")


async def test_a_call_that_ends_while_its_job_is_on_the_way_to_redis_leaves_none_behind(
    waiters: Waiters, for_callers: AsyncGenerationClient, redis: Redis, keys: Keys
) -> None:
    on_the_way, arrived = asyncio.Event(), asyncio.Event()

    async def submit() -> None:
        on_the_way.set()
        await arrived.wait()
        await for_callers.submit(prompt=PROMPT["prompt"], job_id="order-1")

    async def call() -> None:
        async with waiters.waiting("order-1") as stay:
            await stay.send(submit())

    calling = begun(call())
    await on_the_way.wait()
    calling.cancel()
    await asyncio.sleep(0)
    arrived.set()
    await asyncio.wait({calling})
    await until_state(redis, keys, "order-1", "cancelled")
    assert await entries(redis, keys.requests(Priority.NORMAL)) == []


async def test_a_caller_who_leaves_at_any_moment_leaves_no_live_job(
    http: httpx.AsyncClient, redis: Redis, keys: Keys
) -> None:
    for moment in range(60):
        async with hanging(http, **{"Idempotency-Key": f"order-{moment}"}) as call:
            await asyncio.sleep(moment / 5000)
            await hang_up(call)

    async def all_ended() -> bool:
        jobs = [name async for name in redis.scan_iter(keys.job("*"))]
        return {await redis.hget(name, "state") for name in jobs} <= {b"cancelled"}

    await http.get("/health")
    await until(all_ended)


async def test_a_job_that_another_gateways_caller_waits_for_goes_on(
    gateway_env: ProducerSettings, http: httpx.AsyncClient, painter: Painter, redis: Redis, keys: Keys
) -> None:
    async with calling(create_app(gateway_env)) as elsewhere, hanging(http, **KEY) as first:
        lease, delivery = await painter.run_one()
        await marked(redis, keys, "order-1")
        async with hanging(elsewhere, **KEY) as second:
            await until_waiting(redis, keys, "order-1", 2)
            await hang_up(first)
            await until_waiting(redis, keys, "order-1", 1)
            assert not await redis.exists(keys.cancel("order-1"))
            await painter.paint(lease, delivery)
            assert (await second).status_code == 200


async def test_the_last_of_several_to_leave_cancels(http: httpx.AsyncClient, redis: Redis, keys: Keys) -> None:
    async with hanging(http, **KEY) as first, hanging(http, **KEY) as second:
        await until_waiting(redis, keys, "order-1", 2)
        await marked(redis, keys, "order-1")
        await hang_up(first)
        await until_waiting(redis, keys, "order-1", 1)
        assert await state_of(redis, keys, "order-1") == "queued"
        await hang_up(second)
        await until_state(redis, keys, "order-1", "cancelled")


async def test_whoever_follows_a_calls_job_waits_for_it_too(
    http: httpx.AsyncClient, painter: Painter, redis: Redis, keys: Keys
) -> None:
    async with hanging(http, **KEY) as call:
        await until_waiting(redis, keys, "order-1", 1)
        await marked(redis, keys, "order-1")
        async with http.stream("GET", "/v1/jobs/order-1/events") as stream:
            await until_waiting(redis, keys, "order-1", 2)
            await hang_up(call)
            await until_waiting(redis, keys, "order-1", 1)
            assert await state_of(redis, keys, "order-1") == "queued"
            await painter.paint_next()
            assert "generation.succeeded" in (await stream.aread()).decode()


async def test_a_follower_that_leaves_last_cancels_a_calls_job_and_no_other(
    http: httpx.AsyncClient, redis: Redis, keys: Keys
) -> None:
    await http.post("/v1/jobs", json={**PROMPT, "job_id": "order-2"})
    async with hanging(http, **KEY) as call:
        await until_waiting(redis, keys, "order-1", 1)
        await marked(redis, keys, "order-1")
        async with http.stream("GET", "/v1/jobs/order-1/events"), http.stream("GET", "/v1/jobs/order-2/events"):
            await until_waiting(redis, keys, "order-2", 1)
            await hang_up(call)
            await until_waiting(redis, keys, "order-1", 1)
        await until_state(redis, keys, "order-1", "cancelled")
        await until_waiting(redis, keys, "order-2", 0)
    assert await state_of(redis, keys, "order-2") == "queued"


async def test_a_job_that_no_call_has_made_is_never_cancelled_by_a_call_that_leaves(
    http: httpx.AsyncClient, client: AsyncGenerationClient, redis: Redis, keys: Keys
) -> None:
    await client.submit(prompt=PROMPT["prompt"], job_id="order-1")
    async with hanging(http, **KEY) as call:
        await until_waiting(redis, keys, "order-1", 1)
        await hang_up(call)
        await until_waiting(redis, keys, "order-1", 0)
    assert await state_of(redis, keys, "order-1") == "queued"


async def test_a_call_that_finds_a_job_which_others_have_left_gets_the_next_run(
    http: httpx.AsyncClient, painter: Painter, redis: Redis, keys: Keys
) -> None:
    async with hanging(http, **KEY) as first:
        lease, delivery = await painter.run_one()
        await marked(redis, keys, "order-1")
        await hang_up(first)
        await until(lambda: _exists(redis, keys.cancel("order-1")))
        async with hanging(http, **KEY) as second:
            await until_waiting(redis, keys, "order-1", 1)
            await painter.cancel(lease, delivery)
            await painter.paint_next(run=2)
            assert (await second).status_code == 200


async def test_a_call_outlives_the_limit_of_the_one_that_made_the_job(
    http: httpx.AsyncClient, painter: Painter, redis: Redis, keys: Keys
) -> None:
    async with hanging(http, **KEY) as first, hanging(http, **KEY) as second:
        await until_waiting(redis, keys, "order-1", 2)
        await painter.fail_one(ErrorCode.EXPIRED, 0)
        answered, _ = await asyncio.wait({first, second}, return_when=asyncio.FIRST_COMPLETED)
        assert [call.result().status_code for call in answered] == [504]
        await painter.paint_next(run=2)
        assert sorted([(await first).status_code, (await second).status_code]) == [200, 504]


async def test_two_calls_with_one_key_at_one_moment_are_one_job(
    http: httpx.AsyncClient, painter: Painter, redis: Redis, keys: Keys
) -> None:
    calls = [begun(http.post("/generate-image", json=PROMPT, headers=KEY)) for _ in range(8)]
    await until_waiting(redis, keys, "order-1", 8)
    await painter.paint_next()
    answers = [await call for call in calls]
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["job_id"] for answer in answers} == {"order-1"}
    assert await entries(redis, keys.requests(Priority.HIGH)) == []
    assert len(await completions(redis, keys)) == 2  # started, succeeded


async def test_a_finished_call_is_answered_again_and_another_body_is_a_conflict(
    http: httpx.AsyncClient, painter: Painter
) -> None:
    body = {**PROMPT, "lora_url": "https://files.example/a.safetensors?signature=1"}
    call = begun(http.post("/generate-image", json=body, headers=KEY))
    await painter.paint_next()
    first = await call
    signed_again = {**PROMPT, "lora_url": "https://files.example/a.safetensors?signature=2"}
    assert (await http.post("/generate-image", json=signed_again, headers=KEY)).json() == first.json()
    other = await http.post("/generate-image", json={**body, "seed": 8}, headers=KEY)
    assert (other.status_code, other.json()["error_code"], other.json()["job_id"]) == (409, "JOB_CONFLICT", "order-1")


async def test_a_key_makes_the_next_run_where_the_last_could_succeed_and_none_where_it_never_can(
    http: httpx.AsyncClient, painter: Painter
) -> None:
    body = {**PROMPT, "lora_url": "https://files.example/public.safetensors"}  # it has no signature to renew
    ends = [(ErrorCode.LORA_DOWNLOAD_FAILED, 0), (ErrorCode.CUDA_OOM, 30), (ErrorCode.LORA_LOAD_FAILED, None)]
    for run, (code, retry_after) in enumerate(ends, start=1):
        call = begun(http.post("/generate-image", json=body, headers=KEY))
        await painter.fail_one(code, retry_after, run=run)
        assert (await call).json()["error_code"] == code
    again = await http.post("/generate-image", json=body, headers=KEY)
    assert (again.status_code, again.json()["error_code"]) == (400, "LORA_LOAD_FAILED")


async def test_a_key_that_is_no_job_id_is_400(http: httpx.AsyncClient) -> None:
    for key in ("a b", "a" * 65, "ä", "a/b"):
        headers = [(b"Idempotency-Key", key.encode())]
        answer = await http.post("/generate-image", json=PROMPT, headers=headers)
        assert (answer.status_code, answer.json()["error_code"]) == (400, "INVALID_REQUEST")


@pytest.fixture
async def for_callers(gateway_env: ProducerSettings) -> AsyncIterator[AsyncGenerationClient]:
    async with AsyncGenerationClient.from_settings(gateway_env, for_callers=True) as client:
        yield client


@pytest.fixture
async def waiters(client: AsyncGenerationClient, redis: Redis, keys: Keys) -> AsyncIterator[Waiters]:
    background = Background()
    yield Waiters(redis, keys, client.queue, background, hold_s=0.3)
    await background.aclose()


async def test_what_a_killed_gateway_has_noted_lapses_and_what_a_living_one_has_does_not(
    waiters: Waiters, client: AsyncGenerationClient, redis: Redis, keys: Keys
) -> None:
    async with waiters.waiting("killed"), waiters.waiting("alive"):
        members = await redis.zrange(keys.waiters("killed"), 0, -1)
        await redis.rename(keys.waiters("killed"), keys.waiters("left"))  # nobody renews this one
        await until(lambda: _gone(redis, keys.waiters("left")))
        assert await waiters_of(redis, keys, "alive") == 1
    assert len(members) == 1


async def _gone(redis: Redis, key: str) -> bool:
    return not await redis.exists(key)


async def test_leaving_cancels_no_run_but_the_one_that_the_caller_made(
    waiters: Waiters, client: AsyncGenerationClient, for_callers: AsyncGenerationClient
) -> None:
    await for_callers.submit(prompt=PROMPT["prompt"], job_id="order-1")
    async with waiters.waiting("order-1"):
        await client.cancel("order-1")
        await client.resubmit("order-1")
    assert (await client.status("order-1")).state == "queued"
    assert not await waiters.has_been_left("order-1", 2)


async def test_a_run_that_begins_while_the_last_caller_leaves_goes_on(
    client: AsyncGenerationClient, for_callers: AsyncGenerationClient, redis: Redis, keys: Keys
) -> None:
    class Overtaken(ProducerQueue):
        """Between leaving and looking, somebody else ends the run and makes the next one."""

        async def job(self, job_id: str) -> JobRecord | None:
            await client.cancel(job_id)
            await client.resubmit(job_id)
            return await super().job(job_id)

    background = Background()
    await for_callers.submit(prompt=PROMPT["prompt"], job_id="order-1")
    queue = Overtaken(redis, keys, limits=QueueLimits(10), job_ttl_s=60)
    waiters = Waiters(redis, keys, queue, background)
    async with waiters.waiting("order-1"):
        pass
    await background.aclose()
    found = await client.status("order-1")
    assert (found.run, found.state) == (2, "queued")


async def test_a_task_that_loses_a_cancellation_is_stopped_all_the_same() -> None:
    async def deaf() -> None:
        for _ in range(2):
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(60)
        await asyncio.sleep(60)

    task = asyncio.create_task(deaf())
    await asyncio.sleep(0)
    await begun(stop(task))
    assert task.cancelled()
