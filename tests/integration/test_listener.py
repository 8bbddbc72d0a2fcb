"""The listener between a real Redis and a real database: what is stored, called, acknowledged, and when."""

import asyncio
import logging
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog
from redis.asyncio import Redis
from sqlalchemy import Engine

from demo.servers import RedisServer, redis_server
from producer.completions import Completions
from producer.database import open_engine
from producer.listener import Listener, from_settings
from producer.queue import connect
from producer.settings import ProducerSettings
from producer.store import Store
from schemas.events import Event, FailedEvent
from schemas.keys import JobState, Keys
from tests.event_kit import failed, retrying, started, succeeded
from tests.integration.listener_kit import (
    PATIENCE_S,
    make_listener,
    publish,
    reading,
    running,
    state,
    until,
    until_acknowledged,
)
from tests.integration.queue_kit import add
from tests.integration.store_kit import everything, execute

CANARY = "c0ffee5ec2e7"
SIGNED = f"https://bucket.example/lora.safetensors?X-Amz-Signature={CANARY}"


@pytest.fixture
async def listener(redis_at: RedisServer, redis: Redis, keys: Keys, store: Store) -> AsyncIterator[Listener]:
    async with reading(redis_at.url) as reader:
        yield make_listener(redis, reader, keys, store, "ann")


async def test_events_are_stored_handed_out_in_order_and_acknowledged(
    redis: Redis, keys: Keys, store: Store, listener: Listener
) -> None:
    seen: list[str] = []
    listener.on()(lambda event: seen.append(event.id))
    await publish(redis, keys, started(), retrying())
    async with running(listener):
        await publish(redis, keys, started(attempt=2), succeeded(attempt=2))
        await until(lambda: len(seen) == 4)
        await until_acknowledged(redis, keys)
    assert seen == ["job-1:1:started:1", "job-1:1:retrying:1", "job-1:1:started:2", "job-1:1:succeeded"]
    assert state(store) is JobState.SUCCEEDED
    assert store.image("job-1") is not None


async def test_handlers_get_the_types_they_asked_for_async_and_plain_alike(
    redis: Redis, keys: Keys, listener: Listener
) -> None:
    seen: list[tuple[str, str]] = []

    @listener.on("generation.failed")
    async def on_failed(event: FailedEvent) -> None:
        await asyncio.sleep(0)
        seen.append(("failed", event.data.error))

    @listener.on("generation.started", "generation.retrying")
    def on_others(event: Event) -> None:
        seen.append(("others", event.type))

    class Handler:
        async def __call__(self, event: Event) -> None:
            seen.append(("object", event.type))

    listener.on("generation.succeeded")(Handler())
    await publish(redis, keys, started(), retrying(), failed(error="black image"), succeeded("job-2"))
    assert await listener.catch_up() == 4
    assert seen == [
        ("others", "generation.started"),
        ("others", "generation.retrying"),
        ("failed", "black image"),
        ("object", "generation.succeeded"),
    ]


def test_a_handler_for_a_type_that_does_not_exist_is_refused(listener: Listener) -> None:
    with pytest.raises(ValueError, match=r"no such event: generation\.finished"):
        listener.on("generation.finished")


async def test_a_handler_that_raises_is_logged_without_secrets_and_stops_nobody(
    redis: Redis, keys: Keys, listener: Listener
) -> None:
    seen: list[str] = []

    @listener.on()
    async def breaks(event: Event) -> None:
        raise RuntimeError(f"cannot reach {SIGNED}")

    listener.on()(lambda event: seen.append(event.id))
    await publish(redis, keys, started(), failed())
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logs:
        assert await listener.catch_up() == 2
    assert seen == ["job-1:1:started:1", "job-1:1:failed"]
    failures = [entry for entry in logs if entry["event"] == "handler.failed"]
    assert [entry["event_id"] for entry in failures] == seen
    assert all(entry["job_id"] == "job-1" and "breaks" in entry["handler"] for entry in failures)
    assert "RuntimeError: cannot reach https://bucket.example/lora.safetensors" in failures[0]["error"]
    assert CANARY not in str(logs)


async def test_every_log_line_of_an_event_names_its_job(redis: Redis, keys: Keys, listener: Listener) -> None:
    await publish(redis, keys, started("job-7"))
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logs:
        await listener.catch_up()
    [line] = [entry for entry in logs if entry["event"] == "completion.stored"]
    assert (line["job_id"], line["event_id"], line["type"]) == ("job-7", "job-7:1:started:1", "generation.started")


async def test_what_cannot_be_decoded_is_stored_and_logged_and_does_not_block_what_follows(
    redis: Redis, keys: Keys, store: Store, engine: Engine, listener: Listener
) -> None:
    entry_ids = [
        await add(redis, keys.completions, {"payload": payload})
        for payload in (b"", b"\xff\xfe\x00", b"[]", b'{"type":"generation.new"}', SIGNED.encode())
    ]
    entry_ids.append(await add(redis, keys.completions, {"nothing": SIGNED}))
    await publish(redis, keys, failed())
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logs:
        assert await listener.catch_up() == 7
    assert state(store) is JobState.FAILED
    loud = [entry for entry in logs if entry["log_level"] == "error"]
    assert [entry["event_id"] for entry in loud] == [f"undecodable:{entry_id}" for entry_id in entry_ids]
    assert CANARY not in str(logs)
    kept = str(everything(engine))
    assert "nothing=https://bucket.example/lora.safetensors" in kept
    assert CANARY not in kept


async def test_a_listener_that_dies_before_its_acknowledgement_leaves_the_event_to_the_next_one(
    redis_at: RedisServer, redis: Redis, keys: Keys, store: Store, listener: Listener
) -> None:
    entered = asyncio.Event()

    @listener.on()
    async def hangs(event: Event) -> None:
        entered.set()
        await asyncio.Event().wait()

    await publish(redis, keys, failed())
    task = asyncio.create_task(listener.run(asyncio.Event()))
    await asyncio.wait_for(entered.wait(), PATIENCE_S)
    assert state(store) is JobState.FAILED  # committed before the handlers run
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    [pending] = await redis.xpending_range(keys.completions, "listeners", "-", "+", 10)
    await redis.xclaim(keys.completions, "listeners", "ann", 0, [pending["message_id"]], idle=60_000, justid=True)

    seen: list[str] = []
    async with reading(redis_at.url) as reader:
        heir = make_listener(redis, reader, keys, store, "bob")
        heir.on()(lambda event: seen.append(event.id))
        async with running(heir):
            await until(lambda: bool(seen))
            await until_acknowledged(redis, keys)
    assert seen == ["job-1:1:failed"]


async def test_duplicates_are_stored_once_and_reported_as_seen_before(
    redis: Redis, keys: Keys, store: Store, listener: Listener
) -> None:
    await publish(redis, keys, failed(), failed(), started())
    with structlog.testing.capture_logs() as logs:
        assert await listener.catch_up() == 2
    assert [entry["event"] for entry in logs if entry["event"].startswith("completion.")] == [
        "completion.stored",
        "completion.seen_before",
        "completion.stored",
    ]
    assert state(store) is JobState.FAILED


async def test_a_database_that_is_down_is_waited_for_and_nothing_is_acknowledged(
    redis_at: RedisServer, redis: Redis, keys: Keys, tmp_path: Path
) -> None:
    engine = open_engine(f"sqlite:///{tmp_path}/not-there-yet/listener.db")
    store = Store(engine)
    await publish(redis, keys, started(), failed())
    async with reading(redis_at.url) as reader:
        listener = make_listener(redis, reader, keys, store, "ann")
        with structlog.testing.capture_logs() as logs:
            async with running(listener):
                await until(lambda: sum(entry["event"] == "listener.waiting" for entry in logs) >= 3)
                (tmp_path / "not-there-yet").mkdir()
                await until_acknowledged(redis, keys)
    assert state(store) is JobState.FAILED
    engine.dispose()


async def test_a_database_that_breaks_under_the_listener_loses_no_event_and_calls_no_handler_early(
    redis: Redis, keys: Keys, store: Store, engine: Engine, listener: Listener
) -> None:
    seen: list[str] = []
    listener.on()(lambda event: seen.append(event.id))
    with structlog.testing.capture_logs() as logs:
        async with running(listener):
            await publish(redis, keys, started())
            await until_acknowledged(redis, keys)
            execute(engine, "ALTER TABLE events RENAME TO away")
            await publish(redis, keys, failed())
            await until(lambda: sum(entry["event"] == "listener.waiting" for entry in logs) >= 2)
            [pending] = await redis.xpending_range(keys.completions, "listeners", "-", "+", 10)
            assert pending["consumer"] == b"ann"
            assert seen == ["job-1:1:started:1"]
            execute(engine, "ALTER TABLE away RENAME TO events")
            await until_acknowledged(redis, keys)
    assert seen == ["job-1:1:started:1", "job-1:1:failed"]
    assert state(store) is JobState.FAILED


async def test_redis_may_be_down_at_the_start_and_die_in_between(tmp_path: Path, store: Store, keys: Keys) -> None:
    persistent = ("--appendonly", "yes", "--appendfsync", "always")
    with redis_server(tmp_path, *persistent) as server:
        kill(server.process)
        redis = connect(server.url)
        async with reading(server.url) as reader:
            listener = make_listener(redis, reader, keys, store, "ann")
            with structlog.testing.capture_logs() as logs:
                async with running(listener):
                    await until(lambda: any(entry["event"] == "listener.waiting" for entry in logs))
                    with redis_server(tmp_path, *persistent, port=server.port) as again:
                        await publish(redis, keys, started())
                        await until(lambda: state(store) is JobState.RUNNING)
                        kill(again.process)
                        logs.clear()
                        await until(lambda: any(entry["event"] == "listener.waiting" for entry in logs))
                    with redis_server(tmp_path, *persistent, port=server.port):
                        await publish(redis, keys, failed())
                        await until(lambda: state(store) is JobState.FAILED)
                        await until_acknowledged(redis, keys)
        await redis.aclose()


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


async def test_a_flush_under_the_listener_costs_the_past_and_not_the_future(
    redis: Redis, keys: Keys, store: Store, listener: Listener
) -> None:
    async with running(listener):
        await publish(redis, keys, started())
        await until_acknowledged(redis, keys)
        await redis.delete(keys.completions)
        await publish(redis, keys, failed())
        await until(lambda: state(store) is JobState.FAILED)


async def test_the_listener_trims_what_is_done_and_leaves_its_group_tidy(
    redis: Redis, keys: Keys, listener: Listener
) -> None:
    with structlog.testing.capture_logs() as logs:
        async with running(listener):
            await publish(redis, keys, *(started(f"job-{i}") for i in range(250)))
            await until_acknowledged(redis, keys)
            await until(lambda: sum(entry.get("entries", 0) for entry in logs) == 249)  # all but the last delivered
    assert {entry["event"] for entry in logs if "entries" in entry} == {"listener.trimmed"}
    assert await redis.xlen(keys.completions) == 1
    assert await redis.xinfo_consumers(keys.completions, "listeners") == []


async def test_a_stop_lets_the_batch_at_hand_end(redis: Redis, keys: Keys, store: Store, listener: Listener) -> None:
    stop = asyncio.Event()
    seen: list[str] = []

    @listener.on()
    async def stops(event: Event) -> None:
        stop.set()
        await asyncio.sleep(0)
        seen.append(event.id)

    await publish(redis, keys, started(), retrying(), failed())
    await asyncio.wait_for(listener.run(stop), PATIENCE_S)
    assert len(seen) == 3
    await until_acknowledged(redis, keys)


async def test_hours_of_outage_do_not_overflow_the_backoff(
    redis_at: RedisServer, redis: Redis, keys: Keys, tmp_path: Path
) -> None:
    store = Store(open_engine(f"sqlite:///{tmp_path}/missing/listener.db"))
    listener = Listener(Completions(redis, redis, keys, "listeners", "ann"), store, retry_cap_s=0)
    with structlog.testing.capture_logs() as logs:
        async with running(listener):
            await until(lambda: len(logs) > 1100)  # 2.0 ** 1100 is more than a float holds


async def test_from_settings_builds_a_listener_of_its_own_name_and_reads_nothing_before_it_runs(
    redis_at: RedisServer, redis: Redis, keys: Keys, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ProducerSettings(
        REDIS_URL=redis_at.url, SDXL_PREFIX=keys.prefix, DATABASE_URL=f"sqlite:///{tmp_path}/own.db"
    )
    with caplog.at_level(logging.DEBUG):
        async with from_settings(settings, group="audit") as one, from_settings(settings, group="audit") as other:
            assert await redis.exists(keys.completions) == 0
            assert not (tmp_path / "own.db").exists()
            await publish(redis, keys, failed())
            assert await one.catch_up() == 1
            assert await other.catch_up() == 0
            assert state(one.store) is JobState.FAILED
            await publish(redis, keys, failed("job-2"))
            async with running(other):
                await until(lambda: state(other.store, "job-2") is JobState.FAILED)
                await until_acknowledged(redis, keys, "audit")
