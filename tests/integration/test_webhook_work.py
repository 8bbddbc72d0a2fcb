"""`python -m producer work` as a process of its own: forked, stopped, and killed at any moment."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from sqlalchemy import Engine

from demo.servers import RedisServer, redis_server
from producer.database import open_engine
from producer.webhooks.queue import WebhookQueue
from producer.webhooks.receiver import verify
from producer.webhooks.worker import GRACE_S
from schemas.keys import Keys
from tests import event_kit
from tests.integration.cli_kit import Cli
from tests.integration.webhook_kit import HOOK, SECRET, Bench, a_worker, until
from tests.s3_stub import S3Stub, status

EVENT = event_kit.succeeded()


@pytest.fixture
def engine(cli: Cli) -> Iterator[Engine]:
    engine = open_engine(cli.environment["DATABASE_URL"])
    yield engine
    engine.dispose()


@pytest.fixture
async def bench(engine: Engine, stub: S3Stub) -> Bench:
    return Bench(engine, stub)


@pytest.fixture
def environment(cli: Cli) -> dict[str, str]:
    cli.environment |= {
        "WEBHOOK_SECRET": SECRET,
        "WEBHOOK_ALLOWED_HOSTS": "127.0.0.1",
        "LORA_ALLOW_LOOPBACK": "true",
    }
    return cli.environment


@pytest.fixture
def queue(redis_at: RedisServer, keys: Keys) -> Iterator[WebhookQueue]:
    queue = WebhookQueue(redis_at.url, keys.prefix)
    yield queue
    queue.close()


class Held:
    """A receiver that has a request, and answers when it is told to."""

    def __init__(self, stub: S3Stub) -> None:
        self.arrived, self.answer = asyncio.Event(), asyncio.Event()
        stub.answer(HOOK, self._reply, status(200))

    async def _reply(self, request: web.Request) -> web.Response:
        self.arrived.set()
        await self.answer.wait()
        return web.Response()


@pytest.fixture
async def held(stub: S3Stub) -> AsyncIterator[Held]:
    held = Held(stub)
    yield held
    held.answer.set()


async def burst(environment: dict[str, str]) -> str:
    async with a_worker(environment, "--burst") as worker:
        code, said = await worker.until_ended()
    assert code == 0, said
    return said


async def test_a_burst_delivers_what_is_due_and_leaves_nothing_in_rq(
    bench: Bench, queue: WebhookQueue, environment: dict[str, str]
) -> None:
    bench.stub.answer(HOOK, status(200))
    ids = [bench.add(event_kit.failed(f"job-{number}")) for number in range(3)]
    queue.enqueue(ids)
    assert await burst(environment) == ""
    assert {verify(seen.body, seen.headers, SECRET).id for seen in bench.hooks} == set(ids)
    assert {bench.row(event_id).state for event_id in ids} == {"delivered"}
    assert queue.rq.count == 0
    assert queue.failed_ids() == set()
    assert all(queue.rq.fetch_job(queue.job_id(event_id)) is None for event_id in ids)


async def test_an_empty_database_is_migrated_first(cli: Cli, environment: dict[str, str]) -> None:
    await burst(environment)
    assert await asyncio.to_thread(cli.run_json, "webhooks", "list") == []


async def test_what_was_never_enqueued_is_swept_up_at_the_start(bench: Bench, environment: dict[str, str]) -> None:
    bench.later(-GRACE_S - 60)
    event_id = bench.add(EVENT)
    bench.stub.answer(HOOK, status(200))
    assert "put_back" in await burst(environment)
    assert bench.row(event_id).state == "delivered"


async def test_a_failed_attempt_is_scheduled_by_rq_for_when_the_row_says(
    bench: Bench, queue: WebhookQueue, environment: dict[str, str]
) -> None:
    bench.stub.answer(HOOK, status(503, Retry_After="3600"))
    queue.enqueue([bench.add(EVENT)])
    said = await burst(environment)
    assert "answered 503" in said
    row = bench.row(EVENT.id)
    scheduled = queue.rq.scheduled_job_registry.get_scheduled_time(queue.job_id(EVENT.id))
    assert (row.state, row.attempts) == ("pending", 1)
    assert abs((scheduled - row.due_at).total_seconds()) < 30
    assert (scheduled - bench.now).total_seconds() > 3500


async def test_a_second_attempt_is_made_by_the_scheduler_without_anybodys_help(
    bench: Bench, queue: WebhookQueue, environment: dict[str, str]
) -> None:
    bench.stub.answer(HOOK, status(500), status(200))
    queue.enqueue([bench.add(EVENT)])
    scheduled = queue.rq.scheduled_job_registry
    async with a_worker(environment) as worker:
        await until(lambda: bool(scheduled.get_job_ids()))
        queue.rq.connection.zadd(scheduled.key, {queue.job_id(EVENT.id): 1})  # five seconds later
        await until(lambda: bench.row(EVENT.id).state == "delivered")
        worker.process.send_signal(signal.SIGTERM)
        assert (await worker.until_ended())[0] == 0
    assert bench.row(EVENT.id).attempts == len(bench.hooks) == 2


async def test_a_failure_for_good_is_in_the_row_and_in_rqs_registry_until_it_is_retried(
    bench: Bench, queue: WebhookQueue, cli: Cli, environment: dict[str, str]
) -> None:
    event_id = bench.add(EVENT)
    queue.enqueue([event_id])
    said = await burst(environment | {"WEBHOOK_ALLOWED_HOSTS": "hooks.example"})
    assert said.count("not on the allow-list") == 1
    assert "Traceback" not in said
    assert bench.row(event_id).state == "failed"
    assert queue.failed_ids() == {queue.job_id(event_id)}
    await burst(environment)
    assert bench.stub.seen == []

    assert await asyncio.to_thread(cli.run_json, "webhooks", "retry", event_id) == {"retried": [event_id], "left": []}
    assert bench.row(event_id).state == "pending"
    assert queue.failed_ids() == set()
    bench.stub.answer(HOOK, status(200))
    await burst(environment)
    assert bench.row(event_id).state == "delivered"


async def test_sigterm_lets_the_attempt_at_hand_finish(
    bench: Bench, queue: WebhookQueue, held: Held, environment: dict[str, str]
) -> None:
    ids = [bench.add(EVENT), bench.add(event_kit.failed("job-2"))]
    queue.enqueue(ids)
    async with a_worker(environment) as worker:
        await held.arrived.wait()
        worker.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.2)
        assert worker.process.returncode is None
        held.answer.set()
        code, said = await worker.until_ended()
    assert (code, said) == (0, "")
    assert [bench.row(event_id).state for event_id in ids] == ["delivered", "pending"]
    assert queue.rq.job_ids == [queue.job_id(ids[1])]


async def test_a_worker_without_work_ends_at_once_on_sigterm(queue: WebhookQueue, environment: dict[str, str]) -> None:
    async with a_worker(environment) as worker:
        await until(lambda: bool(queue.rq.connection.smembers(f"rq:workers:{queue.rq.name}")))
        worker.process.send_signal(signal.SIGTERM)
        assert await worker.until_ended() == (0, "")


async def test_a_worker_that_is_killed_in_the_middle_delivers_again_under_the_same_id(
    bench: Bench, queue: WebhookQueue, held: Held, environment: dict[str, str]
) -> None:
    queue.enqueue([bench.add(EVENT)])
    async with a_worker(environment) as worker:
        await held.arrived.wait()
        worker.kill()
        await worker.process.wait()
    assert (bench.row(EVENT.id).state, bench.row(EVENT.id).attempts) == ("pending", 1)
    await burst(environment)
    assert len(bench.hooks) == 1  # RQ takes the job for running still

    registry = queue.rq.started_job_registry.key
    running: Any = queue.rq.connection.zrange(registry, 0, -1)
    queue.rq.connection.zadd(registry, dict.fromkeys(running, 1))  # a minute and a half later
    bench.change(EVENT.id, due_at=bench.now)
    said = await burst(environment)
    assert "its process died" in said
    assert [seen.headers["webhook-id"] for seen in bench.hooks] == [EVENT.id] * 2
    assert (bench.row(EVENT.id).state, bench.row(EVENT.id).attempts) == ("delivered", 2)
    assert queue.failed_ids() == set()


async def test_a_process_of_one_job_that_is_killed_costs_one_attempt(
    bench: Bench, queue: WebhookQueue, held: Held, environment: dict[str, str]
) -> None:
    ids = [bench.add(EVENT), bench.add(event_kit.failed("job-2"))]
    queue.enqueue(ids)
    async with a_worker(environment) as worker:
        await held.arrived.wait()
        [horse] = worker.horses()
        horse.kill()
        await until(lambda: bench.row(ids[1]).state == "delivered")
    assert (bench.row(ids[0]).state, bench.row(ids[0]).attempts) == ("pending", 1)
    bench.change(ids[0], due_at=bench.now)
    await burst(environment)
    assert bench.row(ids[0]).state == "delivered"
    assert queue.failed_ids() == set()


async def test_a_database_that_is_away_costs_no_attempt(
    bench: Bench, queue: WebhookQueue, environment: dict[str, str], tmp_path: Path
) -> None:
    event_id = bench.add(EVENT)
    queue.enqueue([event_id])
    with bench.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE deliveries RENAME TO away")
    said = await burst(environment)
    assert "no_database" in said
    with bench.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE away RENAME TO deliveries")
    assert bench.row(event_id).attempts == 0
    assert queue.rq.scheduled_job_registry.get_job_ids() == [queue.job_id(event_id)]
    assert bench.stub.seen == []


async def test_a_redis_that_goes_away_ends_the_worker_when_it_is_asked_to(
    environment: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "redis"
    folder.mkdir()
    with redis_server(folder) as server:
        queue = WebhookQueue(server.url, "away")
        async with a_worker(environment | {"REDIS_URL": server.url, "SDXL_PREFIX": "away"}) as worker:
            await until(lambda: bool(queue.rq.connection.smembers(f"rq:workers:{queue.rq.name}")))
            queue.close()
            server.process.kill()
            server.process.wait()
            worker.process.send_signal(signal.SIGTERM)
            code, said = await worker.until_ended()
    assert code == 3
    assert "Redis is out of reach" in said


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("WEBHOOK_SECRET", "", "WEBHOOK_SECRET is not set"),
        ("WEBHOOK_SECRET", f"{SECRET},whsec_dG9vIHNob3J0", "in WEBHOOK_SECRET, secret 2 of 2 has 9 bytes"),
        ("WEBHOOK_ALLOWED_HOSTS", "https://hooks.example", "WEBHOOK_ALLOWED_HOSTS: not host"),
        ("REDIS_URL", "http://:s3cr3t@nowhere", "REDIS_URL: not the URL of a Redis"),
        ("DATABASE_URL", "mysql://:s3cr3t@nowhere/a", "DATABASE_URL: neither SQLite nor PostgreSQL"),
    ],
)
def test_a_setting_that_would_fail_every_attempt_is_refused_at_the_start(
    cli: Cli, environment: dict[str, str], name: str, value: str, problem: str
) -> None:
    cli.run("work", "--burst", **{name: value})
    assert cli.status == 2
    assert problem in cli.err
    for secret in ("s3cr3t", SECRET, "dG9vIHNob3J0"):
        assert secret not in cli.err
