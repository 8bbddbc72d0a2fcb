"""`/v1/jobs` over a real socket: submitting, looking, following, cancelling."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from producer.gateway import create_app
from producer.settings import ProducerSettings
from schemas.errors import ErrorCode
from schemas.keys import Keys, Priority
from tests.integration.client_kit import begun, blocked, until
from tests.integration.gateway_kit import PROMPT, Painter, calling, state_of, waiters_of
from tests.integration.queue_kit import entries

WIRE = {
    **PROMPT,
    "job_id": "order-1",
    "loras": [{"key": "loras/a.safetensors", "scale": 0.5}, {"url": "https://files.example/b.safetensors?s=1"}],
    "tenant": "studio-7",
    "output_key": "studio-7/order-1.png",
    "metadata": {"order": 1041},
    "expires_at": "2090-01-01T00:00:00Z",
}


@dataclass
class Sent:
    """One server-sent event."""

    event: str
    id: str
    data: Any


def parsed(stream: str) -> list[Sent]:
    found = []
    for block in stream.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append(Sent(fields["event"], fields.get("id", ""), json.loads(fields["data"])))
    return found


async def test_a_job_is_accepted_and_its_whole_request_reaches_the_queue(
    http: httpx.AsyncClient, painter: Painter
) -> None:
    answer = await http.post("/v1/jobs", json=WIRE)
    assert (answer.status_code, answer.headers["Location"]) == (202, "/v1/jobs/order-1")
    assert answer.json() == {"job_id": "order-1", "run": 1, "state": "queued", "duplicate": False}
    request = await painter.paint_next()
    assert (request.tenant, request.image_key, request.metadata) == (
        "studio-7",
        "studio-7/order-1.png",
        {"order": 1041},
    )
    assert [lora.source for lora in request.loras] == ["loras/a.safetensors", "https://files.example/b.safetensors"]


async def test_the_priority_says_which_stream_and_is_one_of_three(
    http: httpx.AsyncClient, redis: Redis, keys: Keys
) -> None:
    for priority in Priority:
        assert (await http.post(f"/v1/jobs?priority={priority}", json=PROMPT)).status_code == 202
        assert len(await entries(redis, keys.requests(priority))) == 1
    answer = await http.post("/v1/jobs?priority=urgent", json=PROMPT)
    assert (answer.status_code, answer.json()["error_code"]) == (400, "INVALID_REQUEST")
    assert [problem["field"] for problem in answer.json()["details"]["problems"]] == ["priority"]


async def test_an_id_comes_from_the_body_else_from_the_header_else_from_nowhere(http: httpx.AsyncClient) -> None:
    key = {"Idempotency-Key": "from-header"}
    assert (await http.post("/v1/jobs", json=WIRE, headers=key)).json()["job_id"] == "order-1"
    assert (await http.post("/v1/jobs", json=PROMPT, headers=key)).json()["job_id"] == "from-header"
    assert (await http.post("/v1/jobs", json={**PROMPT, "job_id": None})).json()["job_id"] not in ("", None)


async def test_the_same_job_twice_is_one_and_another_body_is_409(http: httpx.AsyncClient) -> None:
    await http.post("/v1/jobs", json=WIRE)
    again = await http.post("/v1/jobs", json={**WIRE, "expires_at": None})
    assert (again.status_code, again.json()["duplicate"]) == (202, True)
    other = await http.post("/v1/jobs", json={**WIRE, "seed": 8})
    assert (other.status_code, other.json()["error_code"]) == (409, "JOB_CONFLICT")


async def test_a_job_that_could_succeed_runs_again_when_it_is_posted_again(
    http: httpx.AsyncClient, painter: Painter
) -> None:
    await http.post("/v1/jobs", json=WIRE)
    await painter.fail_one(ErrorCode.GENERATION_FAILED, 30)
    again = (await http.post("/v1/jobs", json=WIRE)).json()
    assert (again["run"], again["state"], again["duplicate"]) == (2, "queued", False)
    request = await painter.paint_next(run=2)
    assert request.loras[1].url == "https://files.example/b.safetensors?s=1"
    finished = (await http.post("/v1/jobs", json=WIRE)).json()
    assert (finished["run"], finished["state"], finished["duplicate"]) == (2, "succeeded", True)


async def test_what_does_not_fit_the_contract_is_400_with_its_code(http: httpx.AsyncClient) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"job_id": "a"}, "INVALID_REQUEST"),
        ({**PROMPT, "job_id": "a b"}, "INVALID_REQUEST"),
        ({**PROMPT, "v": 2}, "INVALID_REQUEST"),
        ({**PROMPT, "metadata": {"a": "x" * 5000}}, "INVALID_REQUEST"),
        ({**PROMPT, "lora_key": "a", "lora_url": "https://a.example/b"}, "INVALID_REQUEST"),
        ({"prompt": "\u0007"}, "INVALID_PROMPT"),
    ]
    for body, code in wrong:
        answer = await http.post("/v1/jobs", json=body)
        assert (answer.status_code, answer.json()["error_code"]) == (400, code)


async def test_a_job_is_shown_from_its_beginning_to_its_event(http: httpx.AsyncClient, painter: Painter) -> None:
    await http.post("/v1/jobs", json=WIRE)
    found = (await http.get("/v1/jobs/order-1")).json()
    assert (found["state"], found["run"], found["priority"], found["event"]) == ("queued", 1, "normal", None)
    await painter.paint_next()
    found = (await http.get("/v1/jobs/order-1")).json()
    assert (found["state"], found["event"]["id"]) == ("succeeded", "order-1:1:succeeded")
    assert found["event"]["data"]["image_key"] == "studio-7/order-1.png"
    assert found["ended_at"].endswith("Z")


async def test_a_job_that_nobody_knows_is_404(http: httpx.AsyncClient, redis: Redis, keys: Keys) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/events")):
        for job_id in ("nobody", "a b", "%00"):
            answer = await http.request(method, f"/v1/jobs/{job_id}{path}")
            assert (answer.status_code, answer.json()["error_code"]) == (404, "JOB_UNKNOWN")
    assert not await redis.exists(keys.cancel("nobody"))


async def test_cancelling_says_what_it_found(http: httpx.AsyncClient, painter: Painter) -> None:
    await http.post("/v1/jobs", json=WIRE)
    lease, delivery = await painter.run_one()
    asked = (await http.delete("/v1/jobs/order-1")).json()
    assert asked == {"job_id": "order-1", "verdict": "asked", "state": "running"}
    await painter.cancel(lease, delivery)
    ended = (await http.delete("/v1/jobs/order-1")).json()
    assert ended == {"job_id": "order-1", "verdict": "ended", "state": "cancelled"}
    await http.post("/v1/jobs", json={**PROMPT, "job_id": "order-2"})
    assert (await http.delete("/v1/jobs/order-2")).json()["verdict"] == "cancelled"


async def test_a_job_is_followed_step_by_step_to_its_event(
    http: httpx.AsyncClient, painter: Painter, redis: Redis
) -> None:
    await http.post("/v1/jobs", json=WIRE)
    following = begun(http.get("/v1/jobs/order-1/events"))
    await blocked(redis)
    lease, delivery = await painter.run_one()
    for step in (1, 2):
        await painter.leases.progress(lease, step, 20, 0.5)
    event = await painter.paint(lease, delivery)
    answer = await following
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert answer.headers["Cache-Control"] == "no-cache"
    *steps, last = parsed(answer.text)
    assert [step.data for step in steps] == [{"step": step, "total": 20, "eta_s": 0.5} for step in (1, 2)]
    assert [step.id for step in steps] == ["1.1", "1.2"]
    assert (last.event, last.id, last.data) == ("generation.succeeded", event.id, json.loads(event.encode()))


async def test_a_follower_comes_back_behind_what_it_has_seen_and_not_again_after_the_end(
    http: httpx.AsyncClient, painter: Painter, redis: Redis
) -> None:
    await http.post("/v1/jobs", json=WIRE)
    lease, delivery = await painter.run_one()
    for step in (1, 2, 3):
        await painter.leases.progress(lease, step, 20, 0.5)
    following = begun(http.get("/v1/jobs/order-1/events", headers={"Last-Event-ID": "1.2"}))
    await blocked(redis)
    for step in (4, 5):
        await painter.leases.progress(lease, step, 20, 0.5)
    event = await painter.paint(lease, delivery)
    assert [sent.id for sent in parsed((await following).text)] == ["1.3", "1.4", "1.5", event.id]
    again = await http.get("/v1/jobs/order-1/events", headers={"Last-Event-ID": "1.5"})
    assert [sent.id for sent in parsed(again.text)] == [event.id]
    done = await http.get("/v1/jobs/order-1/events", headers={"Last-Event-ID": event.id})
    assert (done.status_code, done.content) == (204, b"")


async def test_a_failure_and_a_cancellation_end_a_stream_too(http: httpx.AsyncClient, painter: Painter) -> None:
    await http.post("/v1/jobs", json=WIRE)
    following = begun(http.get("/v1/jobs/order-1/events"))
    await painter.fail_one(ErrorCode.GENERATION_FAILED, None)
    assert [sent.event for sent in parsed((await following).text)] == ["generation.failed"]
    await http.post("/v1/jobs", json={**PROMPT, "job_id": "order-2"})
    await http.delete("/v1/jobs/order-2")
    answer = await http.get("/v1/jobs/order-2/events")
    assert [sent.event for sent in parsed(answer.text)] == ["generation.cancelled"]


async def test_a_stream_whose_job_is_lost_says_so_and_ends(
    http: httpx.AsyncClient, redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.waiting.BLOCK_S", 0.1)
    await http.post("/v1/jobs", json=WIRE)
    following = begun(http.get("/v1/jobs/order-1/events"))
    await until(lambda: _followed(redis, keys))
    await redis.delete(keys.job("order-1"))
    [said] = parsed((await following).text)
    assert (said.event, said.data["error_code"]) == ("problem", "JOB_UNKNOWN")


async def _followed(redis: Redis, keys: Keys) -> bool:
    return await waiters_of(redis, keys, "order-1") == 1


async def test_a_silent_stream_is_kept_alive_by_comments(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastapi.routing._PING_INTERVAL", 0.05)
    await http.post("/v1/jobs", json=WIRE)
    async with asyncio.timeout(10), http.stream("GET", "/v1/jobs/order-1/events") as stream:
        first = await anext(stream.aiter_lines())
    assert first == ": ping"


async def test_shutting_down_answers_those_who_wait_and_ends_the_streams(
    gateway_env: ProducerSettings, redis: Redis, keys: Keys
) -> None:
    app = create_app(gateway_env)
    async with calling(app) as http:
        await http.post("/v1/jobs", json=WIRE)
        following = begun(http.get("/v1/jobs/order-1/events"))
        call = begun(http.post("/generate-image", json=PROMPT, headers={"Idempotency-Key": "order-2"}))
        await until(lambda: _waited_for(redis, keys, "order-1", "order-2"))
        app.state.gateway.closing.set()
        answer = await call
        assert (answer.status_code, answer.json()["error_code"], answer.json()["job_id"]) == (
            503,
            "UNAVAILABLE",
            "order-2",
        )
        assert answer.headers["Retry-After"] == "1"
        assert parsed((await following).text) == []
    assert await state_of(redis, keys, "order-1") == "queued"


async def _waited_for(redis: Redis, keys: Keys, *job_ids: str) -> bool:
    waiting = [await waiters_of(redis, keys, job_id) for job_id in job_ids]
    return waiting == [1, 1] and await state_of(redis, keys, "order-2") == "queued"
