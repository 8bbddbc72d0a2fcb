"""The client's submissions, looks and cancellations on a real Redis."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from demo.servers import RedisServer
from producer.client import AsyncGenerationClient
from producer.errors import JobConflict, JobUnknown, QueueFull, RequestRefused
from producer.jobs import Job
from schemas.entries import decode_entry
from schemas.errors import ErrorCode
from schemas.keys import JobState, Keys, Priority
from schemas.requests import GenerationRequest
from tests import event_kit
from tests.integration.client_kit import CANARY, FOREIGN_URL, Ender, a_client, begun, blocked
from tests.integration.queue_kit import entries

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


async def test_a_submitted_request_waits_in_the_stream_of_its_priority_under_an_id_of_its_own(
    client: AsyncGenerationClient, redis: Redis, keys: Keys
) -> None:
    one = await client.submit(prompt="a red fox", steps=30, priority=Priority.HIGH)
    other = await client.submit(prompt="a red fox", steps=30)
    assert one == Job(one.job_id, 1, JobState.QUEUED, duplicate=False)
    assert one.job_id != other.job_id
    [(_, fields)] = await entries(redis, keys.requests(Priority.HIGH))
    assert decode_entry(fields).request == GenerationRequest(job_id=one.job_id, prompt="a red fox", steps=30)


async def test_the_same_job_is_submitted_once_however_freshly_it_is_signed(
    client: AsyncGenerationClient, redis: Redis, keys: Keys
) -> None:
    first = await client.submit(job_id="job-1", prompt="a red fox", lora_url=f"{FOREIGN_URL}?sig=1")
    second = await client.submit(GenerationRequest(job_id="job-1", prompt="a red fox", lora_url=f"{FOREIGN_URL}?sig=2"))
    assert (first.duplicate, second.duplicate) == (False, True)
    assert second.state == JobState.QUEUED
    assert await redis.xlen(keys.requests(Priority.NORMAL)) == 1


async def test_another_body_under_the_same_id_is_a_conflict(client: AsyncGenerationClient) -> None:
    await client.submit(job_id="job-1", prompt="a red fox")
    with pytest.raises(JobConflict, match="job-1") as caught:
        await client.submit(job_id="job-1", prompt="a blue fox")
    assert caught.value.job_id == "job-1"


async def test_a_full_queue_refuses_and_says_when_to_come_back(redis_at: RedisServer, keys: Keys) -> None:
    async with a_client(redis_at.url, keys, max_queue=2) as client:
        outcomes = await client.submit_many([{"prompt": "a red fox"}] * 3)
        assert [type(outcome) for outcome in outcomes] == [Job, Job, QueueFull]
        with pytest.raises(QueueFull) as caught:
            await client.submit(prompt="a red fox")
    assert caught.value.retry_after == 30


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({"prompt": "\u200b"}, ErrorCode.INVALID_PROMPT, "prompt"),
        ({"prompt": "a fox", "steps": 5}, ErrorCode.INVALID_REQUEST, "steps"),
        ({"prompt": "a fox", "colour": "red"}, ErrorCode.INVALID_REQUEST, "colour"),
        ({"prompt": "a fox", "job_id": "a b"}, ErrorCode.INVALID_REQUEST, "job_id"),
    ],
)
async def test_a_request_that_does_not_fit_is_refused_before_redis_sees_it(
    client: AsyncGenerationClient, redis: Redis, keys: Keys, fields: Any, code: ErrorCode, field: str
) -> None:
    with pytest.raises(RequestRefused) as caught:
        await client.submit(**fields)
    assert caught.value.error_code == code
    assert [problem["field"] for problem in caught.value.details["problems"]] == [field]
    assert await redis.keys(f"*{keys.prefix}*") == []


async def test_a_request_and_fields_together_are_a_mistake_of_the_program(client: AsyncGenerationClient) -> None:
    with pytest.raises(TypeError, match="not both"):
        await client.submit(GenerationRequest(job_id="job-1", prompt="a fox"), steps=30)


async def test_of_many_requests_the_bad_ones_lose_nothing_of_the_others(
    client: AsyncGenerationClient, redis: Redis, keys: Keys
) -> None:
    await client.submit(job_id="taken", prompt="a blue fox")
    requests: list[dict[str, Any]] = [{"job_id": f"j{number}", "prompt": "a red fox"} for number in range(250)]
    requests[10] = {"prompt": 7}
    requests[120] = {"job_id": "taken", "prompt": "a red fox"}
    requests[249] = {"job_id": "j1", "prompt": "a red fox"}
    outcomes = await client.submit_many(requests)
    assert isinstance(outcomes[10], RequestRefused)
    assert isinstance(outcomes[120], JobConflict)
    assert outcomes[249] == Job("j1", 1, JobState.QUEUED, duplicate=True)
    jobs = [outcome.job_id for outcome in outcomes if isinstance(outcome, Job)]
    assert jobs == [f"j{number}" for number in range(250) if number not in (10, 120, 249)] + ["j1"]
    assert await redis.xlen(keys.requests(Priority.NORMAL)) == 248


async def test_a_thousand_prompts_by_seeds_go_in_ten_round_trips_one_after_the_other(
    client: AsyncGenerationClient, redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[dict[str, Any]] = [
        {"job_id": f"cat-{prompt}-{seed}", "prompt": f"prompt {prompt}", "seed": seed, "lora_key": "cat.safetensors"}
        for prompt in range(40)
        for seed in range(25)
    ]
    requests[500] = {**requests[500], "steps": 5}  # refused
    requests[700:710] = requests[:10]  # in one list twice
    sizes: list[int] = []
    in_flight = 0
    submit = client.queue.submit

    async def counted(batch: Any, **options: Any) -> Any:
        nonlocal in_flight
        in_flight += 1
        sizes.append(len(batch))
        assert in_flight == 1
        try:
            return await submit(batch, **options)
        finally:
            in_flight -= 1

    monkeypatch.setattr(client.queue, "submit", counted)
    first, again = await client.submit_many(requests), await client.submit_many(requests)
    assert sizes == ([100] * 9 + [99]) * 2
    for outcomes, duplicates in ((first, 10), (again, 999)):
        assert [number for number, outcome in enumerate(outcomes) if not isinstance(outcome, Job)] == [500]
        assert isinstance(outcomes[500], RequestRefused)
        assert [outcome.job_id for outcome in outcomes] == [request["job_id"] for request in requests]
        assert sum(isinstance(outcome, Job) and outcome.duplicate for outcome in outcomes) == duplicates
    order = [fields[b"job_id"].decode() for _, fields in await entries(redis, keys.requests(Priority.NORMAL))]
    expected = [request["job_id"] for number, request in enumerate(requests) if number not in {500, *range(700, 710)}]
    assert order == expected


async def test_a_trace_context_travels_with_the_entry_to_the_consumer(
    client: AsyncGenerationClient, redis: Redis, keys: Keys
) -> None:
    await client.submit(prompt="a fox", traceparent=TRACEPARENT)
    await client.submit_many([{"prompt": "a fox"}] * 2, traceparent=TRACEPARENT)
    await client.submit(prompt="a fox")
    found = [decode_entry(fields) for _, fields in await entries(redis, keys.requests(Priority.NORMAL))]
    assert [entry.traceparent for entry in found] == [TRACEPARENT] * 3 + [None]
    assert all(entry.request for entry in found)


@pytest.mark.parametrize(
    "traceparent", ["", "00", TRACEPARENT.upper(), f"{TRACEPARENT}\n", f"ff{TRACEPARENT[2:]}", "ü"]
)
async def test_a_trace_context_that_consumers_would_ignore_is_refused(
    client: AsyncGenerationClient, redis: Redis, keys: Keys, traceparent: str
) -> None:
    with pytest.raises(RequestRefused, match="traceparent") as caught:
        await client.submit(prompt="a fox", traceparent=traceparent)
    assert (caught.value.error_code, caught.value.details) == (ErrorCode.INVALID_REQUEST, {"field": "traceparent"})
    assert await redis.keys(f"*{keys.prefix}*") == []


@pytest.mark.parametrize("options", ["decode_responses=true", "socket_timeout=0.01&decode_responses=false"])
async def test_options_in_the_url_for_other_programs_do_not_reach_what_works_in_bytes(
    redis_at: RedisServer, keys: Keys, ann: Ender, redis: Redis, options: str
) -> None:
    with capture_logs() as logs:
        async with a_client(f"{redis_at.url}?{options}", keys) as client:
            await client.submit(job_id="job-1", prompt="a fox")
            result = begun(client.result("job-1"))
            await blocked(redis)
            event = await ann.succeed_next()
            assert await result == event
            assert (await client.status("job-1")).event == event
    assert logs == []


@pytest.mark.parametrize("url", ["http://x", "redis://:canary@x?no_such=1", "redis://x?socket_timeout=canary"])
def test_a_url_that_is_none_of_redis_is_refused_without_showing_it(url: str, keys: Keys) -> None:
    with pytest.raises(ValueError, match="not the URL of a Redis") as caught:
        a_client(url, keys)
    assert "canary" not in str(caught.value)


async def test_more_callers_than_connections_wait_for_their_turn(
    client: AsyncGenerationClient, redis: Redis, keys: Keys
) -> None:
    await asyncio.gather(*(client.submit(prompt="a red fox") for _ in range(200)))
    assert await redis.xlen(keys.requests(Priority.NORMAL)) == 200


async def test_consumers_are_woken_for_what_is_queued_and_a_failure_to_do_so_is_only_logged(
    redis_at: RedisServer, keys: Keys, ann: Ender
) -> None:
    calls: list[str] = []

    async def wake() -> None:
        calls.append("woken")
        raise RuntimeError(f"https://wake.example/?{CANARY}")

    with capture_logs() as logs:
        async with a_client(redis_at.url, keys, wake=wake) as client:
            await client.submit(job_id="job-1", prompt="a fox")
            await client.submit(job_id="job-1", prompt="a fox")  # the first reply may have been lost
            await client.submit_many([{"prompt": "a fox"}] * 3)
            assert len(calls) == 3
            await ann.run_next()
            await client.submit(job_id="job-1", prompt="a fox")
            await client.submit_many([{"prompt": ""}])
    assert len(calls) == 3
    assert [entry["event"] for entry in logs] == ["wake_failed"] * 3
    assert "canary" not in str(logs)


async def test_the_status_follows_a_job_to_its_event(client: AsyncGenerationClient, ann: Ender) -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    await client.submit(job_id="job-1", prompt="a fox", priority=Priority.LOW)
    queued = await client.status("job-1")
    assert (queued.state, queued.run, queued.attempt, queued.priority) == ("queued", 1, 0, "low")
    assert before < queued.submitted_at < datetime.now(UTC) + timedelta(seconds=1)
    assert (queued.ended_at, queued.event, queued.consumer) == (None, None, None)
    lease, delivery = await ann.run_next()
    assert (await client.status("job-1")).consumer == "ann"
    event = event_kit.succeeded("job-1")
    await ann.end(lease, delivery, event)
    ended = await client.status("job-1")
    assert (ended.state, ended.attempt, ended.event) == ("succeeded", 1, event)
    assert ended.ended_at is not None
    assert ended.ended_at >= ended.submitted_at


async def test_an_event_from_another_time_does_not_hide_the_rest_of_the_status(
    client: AsyncGenerationClient, redis: Redis, keys: Keys
) -> None:
    await client.submit(job_id="job-1", prompt="a fox")
    await redis.hset(keys.job("job-1"), mapping={"state": "failed", "event": b"\xff", "ended_at": "1000"})
    found = await client.status("job-1")
    assert (found.state, found.event) == ("failed", None)
    assert found.ended_at == datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)


@pytest.mark.parametrize("job_id", ["nobody", "", "a b", "../x", "x" * 65])
async def test_an_unknown_id_is_called_unknown_wherever_it_is_used(client: AsyncGenerationClient, job_id: str) -> None:
    with pytest.raises(JobUnknown):
        await client.status(job_id)
    with pytest.raises(JobUnknown):
        await client.result(job_id)
    with pytest.raises(JobUnknown):
        await client.resubmit(job_id)
