"""The example backend from HTTP request to stored row: a real Redis, SQLite and PostgreSQL, and a consumer by hand."""

import asyncio
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from pydantic import ValidationError
from redis.asyncio import Redis
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from demo.servers import RedisServer
from examples.backend import loops
from examples.backend.content import Outcome, Tier, conclude, order
from examples.backend.settings import BackendSettings
from examples.backend.tables import FAILED, SUCCEEDED, LoraModel, open_sessions
from producer.client import AsyncGenerationClient
from schemas.entries import decode_entry
from schemas.keys import Keys, Priority
from schemas.requests import GenerationRequest
from tests import event_kit
from tests.integration.backend_kit import contents, fill, logged, ordered, outbox, serving, settings_for, shown
from tests.integration.client_kit import Ender, until
from tests.integration.queue_kit import add, entries


@pytest.fixture
def sessions(database_url: str) -> Iterator[sessionmaker[Session]]:
    opened = open_sessions(database_url)
    fill(opened)
    yield opened
    opened.kw["bind"].dispose()


@pytest.fixture
def settings(redis_at: RedisServer, keys: Keys, database_url: str, sessions: object) -> BackendSettings:
    return settings_for(redis_at.url, keys, database_url)


on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)  # where the database does not matter


async def published(redis: Redis, keys: Keys, priority: Priority = Priority.NORMAL) -> list[GenerationRequest]:
    requests = [decode_entry(fields).request for _, fields in await entries(redis, keys.requests(priority))]
    return [request for request in requests if request is not None]


async def until_published(redis: Redis, keys: Keys, count: int = 1) -> None:
    async def enough() -> bool:
        return await redis.xlen(keys.requests(Priority.NORMAL)) >= count

    await until(enough)


async def test_an_order_becomes_a_job_and_its_picture_a_row(
    settings: BackendSettings, sessions: sessionmaker[Session], redis: Redis, keys: Keys, ann: Ender
) -> None:
    async with serving(settings) as web:
        placed = await ordered(web, "in the rain")
        await until_published(redis, keys)
        [request] = await published(redis, keys)
        await ann.succeed_next()
        view = await shown(web, placed["content_id"])
    assert placed["status"] == "pending"
    assert request.job_id == placed["job_id"]
    assert request.prompt == "ann woman, a portrait, in the rain"
    assert (request.lora_key, request.lora_scale, request.lora_version) == ("loras/ann.safetensors", 0.8, "2")
    assert (request.steps, request.width, request.height, request.timeout) == (28, 1024, 1024, 300)
    assert request.expires_at is not None
    assert request.metadata == {"content_id": placed["content_id"], "avatar_id": "ann"}
    assert view["status"] == "succeeded"
    assert view["image_url"] == f"https://images.example/images/{placed['job_id']}.png"
    assert (view["image_sha256"], view["seed"], view["timings"]["total"]) == ("ab" * 32, 2**32 - 1, 15)
    [row] = contents(sessions)
    assert (row.id, row.run, row.image_key) == (placed["content_id"], 1, f"images/{placed['job_id']}.png")
    assert outbox(sessions) == []


@on_sqlite
async def test_a_tier_decides_size_steps_and_how_urgent_it_is(
    settings: BackendSettings, redis: Redis, keys: Keys
) -> None:
    async with serving(settings) as web:
        for tier in ("free", "premium"):
            await ordered(web, avatar_id="tree", tier=tier)
        await until(lambda: _all_empty(settings))
    [free] = await published(redis, keys, Priority.LOW)
    [premium] = await published(redis, keys, Priority.HIGH)
    assert (free.steps, free.width, free.height) == (20, 512, 512)
    assert (premium.steps, premium.width, premium.height) == (40, 1024, 1344)
    assert free.lora_refs == ()
    assert free.prompt == "an old tree, in the rain"


async def _all_empty(settings: BackendSettings) -> bool:
    opened = open_sessions(settings.database_url.get_secret_value())
    try:
        return not await asyncio.to_thread(outbox, opened)
    finally:
        opened.kw["bind"].dispose()


@on_sqlite
async def test_a_lora_elsewhere_is_named_by_its_url(
    settings: BackendSettings, sessions: sessionmaker[Session], redis: Redis, keys: Keys
) -> None:
    url = "https://loras.example/ann.safetensors"
    fill(sessions, LoraModel(id="ann-3", trigger_word="ann", url=url))
    async with serving(settings) as web:
        await ordered(web)
        await until_published(redis, keys)
    [request] = await published(redis, keys)
    assert (request.lora_url, request.lora_key) == (url, None)


@on_sqlite
async def test_an_avatar_that_is_not_there_leaves_nothing_behind(
    settings: BackendSettings, sessions: sessionmaker[Session]
) -> None:
    async with serving(settings, loops=False) as web:
        body = {"avatar_id": "bob", "custom_prompt": "in the rain"}
        answer = await web.post("/api/v1/content/generate", json=body)
        unknown = await web.get("/api/v1/content/nobody")
    assert (answer.status_code, unknown.status_code) == (404, 404)
    assert (contents(sessions), outbox(sessions)) == ([], [])


@pytest.mark.parametrize(
    "body",
    [
        {"avatar_id": "ann"},
        {"avatar_id": "ann", "custom_prompt": ""},
        {"avatar_id": "ann", "custom_prompt": "x" * 2001},
        {"avatar_id": "ann", "custom_prompt": "a\0b"},
        {"avatar_id": "ann", "custom_prompt": "x", "tier": "gold"},
        {"avatar_id": "ann", "custom_prompt": "x", "steps": 50},
    ],
)
async def test_a_body_that_does_not_fit_is_refused(redis_at: RedisServer, keys: Keys, body: dict[str, Any]) -> None:
    async with serving(settings_for(redis_at.url, keys, "sqlite://"), loops=False) as web:
        answer = await web.post("/api/v1/content/generate", json=body)
    assert answer.status_code == 422


async def test_text_that_no_database_keeps_is_refused(redis_at: RedisServer, keys: Keys) -> None:
    async with serving(settings_for(redis_at.url, keys, "sqlite://"), loops=False) as web:
        body = b'{"avatar_id": "ann", "custom_prompt": "\\ud800"}'
        answer = await web.post("/api/v1/content/generate", content=body, headers={"content-type": "application/json"})
        shown = await web.get("/api/v1/content/%00")
    assert (answer.status_code, shown.status_code) == (422, 422)


@on_sqlite
async def test_a_request_that_the_queue_refuses_fails_its_content_alone(
    settings: BackendSettings, redis: Redis, keys: Keys
) -> None:
    async with serving(settings) as web:
        bad = await ordered(web, "a bell \x07 rings")
        good = await ordered(web)
        view = await shown(web, bad["content_id"])
        await until_published(redis, keys)
    assert (view["status"], view["error_code"], view["retry_after"]) == ("failed", "INVALID_PROMPT", None)
    assert "U+0007" in view["error"]
    assert [request.job_id for request in await published(redis, keys)] == [good["job_id"]]


async def test_a_failed_run_says_when_another_can_succeed_and_a_replay_puts_it_right(
    settings: BackendSettings, redis: Redis, keys: Keys, ann: Ender, client: AsyncGenerationClient
) -> None:
    async with serving(settings) as web:
        placed = await ordered(web)
        await until_published(redis, keys)
        await ann.fail_next(error="black image\0")
        failed = await shown(web, placed["content_id"])
        await client.resubmit(placed["job_id"])
        await ann.succeed_next(run=2)
        view = await shown(web, placed["content_id"], instead_of="failed")
    assert (failed["status"], failed["error_code"], failed["retry_after"]) == ("failed", "GENERATION_FAILED", 30)
    assert failed["error"] == "black image"
    assert view["status"] == "succeeded"
    assert view["error"] is view["error_code"] is view["retry_after"] is None


@on_sqlite
async def test_an_order_is_published_at_once_however_rarely_the_relay_looks_by_itself(
    redis_at: RedisServer, redis: Redis, keys: Keys, database_url: str, sessions: object
) -> None:
    settings = settings_for(redis_at.url, keys, database_url, MODAL_POLL_SECONDS=3600)
    async with serving(settings) as web:
        for count in (1, 2):
            await ordered(web)
            await until_published(redis, keys, count)


@on_sqlite
async def test_a_cancelled_job_cancels_its_content(
    settings: BackendSettings, redis: Redis, keys: Keys, client: AsyncGenerationClient
) -> None:
    async with serving(settings) as web:
        placed = await ordered(web)
        await until_published(redis, keys)
        await client.cancel(placed["job_id"])
        view = await shown(web, placed["content_id"])
    assert (view["status"], view["error_code"]) == ("cancelled", "CANCELLED")


@on_sqlite
async def test_events_that_come_again_or_late_or_of_strangers_change_nothing(
    settings: BackendSettings, sessions: sessionmaker[Session], redis: Redis, keys: Keys
) -> None:
    async with serving(settings) as web:
        placed = await ordered(web)
        await until_published(redis, keys)
        job_id = placed["job_id"]
        for event in (
            event_kit.succeeded("of-another-backend"),
            event_kit.succeeded(job_id, run=2),
            event_kit.succeeded(job_id, run=2),
            event_kit.failed(job_id, run=1),
            event_kit.failed(job_id, run=2),
            event_kit.started(job_id, run=3),
        ):
            last = await add(redis, keys.completions, {"payload": event.encode()})

        async def acknowledged() -> bool:
            groups: Any = await redis.xinfo_groups(keys.completions)
            return [(group["pending"], group["last-delivered-id"]) for group in groups] == [(0, last.encode())]

        await until(acknowledged)
        view = await shown(web, placed["content_id"])
    assert (view["status"], view["error_code"]) == ("succeeded", None)
    assert [row.run for row in contents(sessions)] == [2]


def test_an_order_without_its_outbox_entry_is_not_stored_either(sessions: sessionmaker[Session]) -> None:
    with sessions.begin() as session:
        session.execute(text("ALTER TABLE outbox RENAME TO away"))
    with pytest.raises(DBAPIError):
        order(sessions, "ann", "in the rain", Tier.FREE, timeout_s=300)
    assert contents(sessions) == []


def test_an_outcome_is_kept_once(sessions: sessionmaker[Session]) -> None:
    with sessions.begin() as session:
        assert not conclude(session, "of-another-backend", 1, Outcome(SUCCEEDED))
    row = order(sessions, "ann", "in the rain", Tier.FREE, timeout_s=300)
    with sessions.begin() as session:
        changes = [conclude(session, row.job_id, run, Outcome(FAILED)) for run in (1, 1, 2, 1)]
    assert changes == [True, False, True, False]


@pytest.mark.parametrize("public_url", ["https://images.example/1.png", None])
@on_sqlite
async def test_a_picture_is_shown_by_its_public_url_else_by_a_signed_one(
    redis_at: RedisServer,
    redis: Redis,
    keys: Keys,
    database_url: str,
    sessions: object,
    ann: Ender,
    public_url: str | None,
) -> None:
    bucket = {"R2_ENDPOINT_URL": "https://r2.example", "R2_BUCKET_NAME": "pictures"}
    secrets = {"R2_ACCESS_KEY_ID": "id", "R2_SECRET_ACCESS_KEY": "secret"}
    async with serving(settings_for(redis_at.url, keys, database_url, **bucket, **secrets)) as web:
        placed = await ordered(web)
        await until_published(redis, keys)
        lease, delivery = await ann.run_next()
        await ann.end(lease, delivery, event_kit.succeeded(lease.job_id, image_url=public_url))
        view = await shown(web, placed["content_id"])
    shown_url = httpx.URL(view["image_url"])
    signed = f"https://r2.example/pictures/images/{placed['job_id']}.png"
    assert str(shown_url.copy_with(query=None)) == (public_url or signed)
    assert shown_url.params.get("X-Amz-Expires") == (None if public_url else "3600")


async def test_an_event_waits_for_a_database_that_is_away(
    redis_at: RedisServer, redis: Redis, keys: Keys, ann: Ender, tmp_path: Path
) -> None:
    database = tmp_path / "own.db"
    opened = open_sessions(f"sqlite:///{database}")
    fill(opened)
    async with serving(settings_for(redis_at.url, keys, f"sqlite:///{database}")) as web:
        placed = await ordered(web)
        await until_published(redis, keys)
        await until(lambda: _all_empty(settings_for(redis_at.url, keys, f"sqlite:///{database}")))
        with structlog.testing.capture_logs() as logs:
            _execute(database, "ALTER TABLE content RENAME TO away")
            await ann.succeed_next()
            await until(lambda: logged(logs, "content.waiting"))
            _execute(database, "ALTER TABLE away RENAME TO content")
        view = await shown(web, placed["content_id"])
    assert view["status"] == "succeeded"
    opened.kw["bind"].dispose()


def _execute(database: Path, statement: str) -> None:
    connection = sqlite3.connect(database, timeout=20)
    connection.execute(statement)
    connection.close()


async def test_a_loop_that_dies_is_told_and_makes_the_backend_unhealthy(
    redis_at: RedisServer, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def breaks(*_: object) -> None:
        raise RuntimeError("at https://r2.example/lora?X-Amz-Signature=canary")

    settings = settings_for(redis_at.url, keys, "sqlite://")
    monkeypatch.setattr(loops, "run_relay", breaks)
    with structlog.testing.capture_logs() as logs:
        async with serving(settings) as web:
            await until(lambda: logged(logs, "loop.died"))
            assert (await web.get("/health")).status_code == 503
    assert "canary" not in str(logs)


@pytest.mark.parametrize(
    "environment",
    [{"LORA_PROVIDER": "replicate"}, {"LORA_PROVIDER": "http"}, {"MODAL_POLL_SECONDS": "0"}],
)
def test_settings_that_cannot_work_are_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError):
        BackendSettings()
