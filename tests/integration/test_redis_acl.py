"""The users of docs/redis-acl.md, on a real Redis: each does all of its role's work, and nothing else."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from redis import Redis as BlockingRedis
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError

from consumer.errors import LoraFetchInterrupted, LoraUrlExpired
from consumer.queue import Presence
from demo.servers import RedisServer, redis_server
from producer.client import AsyncGenerationClient
from producer.database import open_engine
from producer.errors import JobFailed, QueueFull
from producer.gateway import create_app
from producer.queue import connect
from producer.settings import ProducerSettings
from producer.store import Store
from producer.webhooks.queue import WebhookQueue
from producer.webhooks.rows import Deliveries
from producer.webhooks.worker import Sweeper
from schemas.errors import ErrorCode
from schemas.events import SucceededEvent
from schemas.keys import Keys, Priority
from tests import event_kit
from tests.integration.cli_kit import Cli, a_cli
from tests.integration.client_kit import Ender, a_client, begun, blocked, consume
from tests.integration.gateway_kit import Painter, calling, gateway_settings
from tests.integration.letter_kit import a_dead_job
from tests.integration.listener_kit import make_listener, publish, reading, running, until_acknowledged
from tests.integration.queue_kit import a_request, add, entries, job, let_lease_run_out
from tests.integration.webhook_kit import SECRET, a_worker
from tests.integration.worker_kit import Bench, of_job

DOCUMENT = Path(__file__).parents[2] / "docs" / "redis-acl.md"
ROLES = ("publisher", "consumer", "listener", "webhooks", "operator")
KEYS = Keys("sdxl")
NOBODY_LISTENS = "http://127.0.0.1:1/hook"


def acl_file() -> str:
    """The document's one block of rules."""
    return DOCUMENT.read_text().split("```acl\n")[1].split("```")[0]


def password(role: str) -> str:
    [line] = [line for line in acl_file().splitlines() if line.startswith(f"user sdxl-{role} ")]
    [given] = [word for word in line.split() if word.startswith(">")]
    return given[1:]


class Guarded:
    """A Redis with the document's users, as its ACL file has them, and an administrator's way in."""

    def __init__(self, server: RedisServer) -> None:
        self.server = server
        self.admin_url = f"redis://admin:admin@127.0.0.1:{server.port}/0"

    def url(self, role: str) -> str:
        return f"redis://sdxl-{role}:{password(role)}@127.0.0.1:{self.server.port}/0"


@pytest.fixture(scope="module")
def guarded_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("acl")
    (folder / "users.acl").write_text(acl_file() + "user admin on >admin ~* &* +@all\n")
    with redis_server(folder, "--aclfile", str(folder / "users.acl")) as server:
        yield Guarded(server)


@pytest.fixture
def guarded(guarded_server: Guarded) -> Guarded:
    with BlockingRedis.from_url(guarded_server.admin_url) as admin:
        admin.flushall()
        admin.script_flush()
        admin.execute_command("ACL", "LOG", "RESET")
    return guarded_server


@pytest.fixture
async def admin(guarded: Guarded) -> AsyncIterator[Redis]:
    client = Redis.from_url(guarded.admin_url)
    yield client
    await client.aclose()


@pytest.fixture
async def publisher(guarded: Guarded) -> AsyncIterator[AsyncGenerationClient]:
    async with a_client(guarded.url("publisher"), KEYS) as client:
        yield client


@pytest.fixture
def operator(guarded: Guarded, tmp_path: Path) -> Iterator[Cli]:
    with a_cli(guarded.server, KEYS, tmp_path) as cli:
        cli.environment["REDIS_URL"] = guarded.url("operator")
        yield cli


async def refused(admin: Redis) -> list[str]:
    """What the server has refused since the last test, apart from the client libraries' own introductions."""
    log: Any = await admin.acl_log()
    return [f"{entry['username']}: {entry['object']}" for entry in log if not _is_introduction(entry)]


def _is_introduction(entry: dict[str, Any]) -> bool:
    return str(entry["object"]).startswith("client")  # CLIENT SETINFO and the like: the libraries do without


async def test_a_publisher_submits_waits_and_cancels(
    guarded: Guarded, publisher: AsyncGenerationClient, admin: Redis
) -> None:
    consumer = Ender(admin, KEYS, "ann")
    await publisher.submit_many([{"job_id": name, "prompt": "a red fox", "tenant": "t"} for name in ("a", "b", "c")])
    waiting = begun(publisher.result("a"))
    await blocked(admin)
    await consumer.succeed_next()
    assert (await waiting).data.job_id == "a"
    assert isinstance([event async for event in publisher.events("a")][-1], SucceededEvent)
    await consumer.expire_next()
    with pytest.raises(JobFailed):
        await publisher.result("b")
    await publisher.resubmit("b", lora_key="loras/fox.safetensors")
    lease, _ = await consumer.take_next()
    assert lease.job_id == "c"
    for job_id, answer in (("c", "asked"), ("b", "cancelled"), ("unknown", "asked")):
        assert (await publisher.cancel(job_id)).verdict == answer
    assert (await publisher.status("b")).state == "cancelled"
    assert await refused(admin) == []


async def test_a_publisher_looks_for_room_among_the_completions_before_it_refuses(
    guarded: Guarded, admin: Redis
) -> None:
    for group in ("quick", "slow"):
        await admin.xgroup_create(KEYS.completions, group, id="0", mkstream=True)
    for number in range(3):
        await admin.xadd(KEYS.completions, {"payload": str(number)})
    reply: Any = await admin.xreadgroup("slow", "eve", {KEYS.completions: ">"}, count=2)
    [[_, taken]] = reply.items() if isinstance(reply, dict) else reply
    async with a_client(guarded.url("publisher"), KEYS, completions=3) as client:
        with pytest.raises(QueueFull) as caught:
            await client.submit(job_id="a", prompt="a red fox")
        assert caught.value.details["limit"] == "completions"
        await admin.xack(KEYS.completions, "slow", *(entry_id for entry_id, _ in taken))
        await admin.xgroup_destroy(KEYS.completions, "quick")
        await client.submit(job_id="a", prompt="a red fox")
    assert await refused(admin) == []


def publishers_settings(guarded: Guarded) -> ProducerSettings:
    """A gateway's, with the publisher's user and a storage that nobody asks."""
    storage = {"r2_endpoint_url": "http://127.0.0.1:1", "r2_bucket": "pictures"}
    keys = {"r2_access_key_id": SecretStr("id"), "r2_secret_access_key": SecretStr("key")}
    settings = gateway_settings(guarded.server, KEYS, None, **storage, **keys)
    return settings.model_copy(update={"redis_url": SecretStr(guarded.url("publisher"))})


async def test_a_gateway_works_with_the_publishers_user(guarded: Guarded, admin: Redis) -> None:
    async with calling(create_app(publishers_settings(guarded))) as http:
        assert (await http.post("/v1/jobs", json={"prompt": "a fox", "job_id": "a"})).status_code == 202
        assert (await http.get("/health")).json()["backlog"] == 1
        await Painter(admin, KEYS, "pat").fail_one(ErrorCode.GENERATION_FAILED, 30)
        assert (await http.get("/v1/jobs/a")).json()["state"] == "failed"
        assert (await http.delete("/v1/jobs/a")).status_code < 500
    assert await refused(admin) == []


async def test_waiters_of_a_synchronous_call_come_and_go_with_the_publishers_user(
    guarded: Guarded, admin: Redis
) -> None:
    async with calling(create_app(publishers_settings(guarded))) as http:
        headers = {"Idempotency-Key": "sync"}
        answer = await http.post("/generate-image", json={"prompt": "a fox", "timeout": 1}, headers=headers)
        assert answer.status_code == 504
    assert (await job(admin, KEYS, "sync"))["state"] == "cancelled"
    assert await refused(admin) == []


async def test_a_consumer_takes_retries_reclaims_buries_ends_and_leaves(guarded: Guarded, admin: Redis) -> None:
    bench = Bench(admin, KEYS, guarded.url("consumer"))
    bench.fetcher.fail_with = [LoraFetchInterrupted("503"), LoraUrlExpired("403")]
    dead = Ender(admin, KEYS, "bob")
    await publish_request(admin, "orphan")
    delivery = await dead.read_one()
    await let_lease_run_out(admin, KEYS, delivery, "bob")
    await add(admin, KEYS.requests(Priority.NORMAL), {"payload": b"\xff"})
    await publish_request(admin, "retried", lora_key="x")
    await publish_request(admin, "expired", lora_key="x")
    await publish_request(admin, "plain")
    await publish_request(admin, "plain")
    await admin.set(KEYS.cancel("stopped"), 1)
    await publish_request(admin, "stopped")
    async with bench.working():
        events = await bench.ended("orphan", "retried", "expired", "plain", "stopped")
    ends = {name: of_job(events, name)[-1] for name in ("orphan", "expired", "stopped", "plain")}
    assert ends == {"orphan": "succeeded", "expired": "failed", "stopped": "cancelled", "plain": "succeeded"}
    assert "retrying" in [event["type"].split(".")[1] for event in events]
    assert await admin.xlen(KEYS.dead) == 2
    assert await admin.exists(KEYS.consumers, KEYS.consumer("ann")) == 0
    assert await refused(admin) == []


async def publish_request(redis: Redis, job_id: str, **fields: Any) -> None:
    await add(redis, KEYS.requests(Priority.NORMAL), {"payload": a_request(job_id, **fields).encode()})


async def test_a_consumer_hands_back_and_notes_uploads(guarded: Guarded, admin: Redis) -> None:
    client = connect(guarded.url("consumer"))
    consumer = Ender(client, KEYS, "ann")
    await publish_request(admin, "a")
    lease, _ = await consumer.take_next()
    assert await consumer.leases.note_upload(lease, b"noted") == []
    assert await consumer.leases.extend(lease) == "ok"
    assert await consumer.leases.release(lease) == "ok"
    await Presence(client, KEYS, "ann").heartbeat({"state": "failed"})
    await client.aclose()
    assert await refused(admin) == []


async def test_a_listener_reads_reclaims_trims_enqueues_webhooks_and_leaves(
    guarded: Guarded, admin: Redis, tmp_path: Path
) -> None:
    ended = Ender(admin, KEYS, "ann")
    async with a_client(guarded.admin_url, KEYS) as client:
        await client.submit(job_id="a", prompt="a fox", webhook_url="https://hooks.example/a")
        await ended.succeed_next()
    await admin.xgroup_create(KEYS.completions, "listeners", id="0")
    await admin.xreadgroup("listeners", "gone", {KEYS.completions: ">"}, count=1)
    await admin.xclaim(KEYS.completions, "listeners", "gone", 0, await _ids(admin), idle=3_600_000)
    url = guarded.url("listener")
    webhooks, redis = WebhookQueue(url, KEYS.prefix), connect(url)
    with open_store(tmp_path) as store:
        async with (
            reading(url) as reader,
            running(make_listener(redis, reader, KEYS, store, "l", enqueue=webhooks.enqueue)),
        ):
            await publish(admin, KEYS, event_kit.failed("b"))
            await until_acknowledged(admin, KEYS)
            async with asyncio.timeout(10):
                while await admin.xlen(KEYS.completions) > 1 or not await admin.exists("rq:queue:sdxl-webhooks"):
                    await asyncio.sleep(0.02)
    await redis.aclose()
    webhooks.close()
    assert [row["name"] for row in await admin.xinfo_consumers(KEYS.completions, "listeners")] in ([], [b"gone"])
    assert await refused(admin) == []


@contextmanager
def open_store(folder: Path) -> Iterator[Store]:
    """The listener's tables, in a file of the test's own."""
    engine = open_engine(f"sqlite:///{folder / 'events.db'}")
    store = Store(engine)
    store.migrate()
    yield store
    engine.dispose()


async def _ids(redis: Redis) -> Any:
    return [entry_id for entry_id, _ in await entries(redis, KEYS.completions)]


async def test_a_worker_for_webhooks_needs_rqs_keys_alone(guarded: Guarded, admin: Redis, tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path / 'events.db'}"
    engine = open_engine(database)
    store = Store(engine)
    store.migrate()
    queue = WebhookQueue(guarded.url("webhooks"), KEYS.prefix)
    for number in range(2):
        event = event_kit.succeeded(f"job-{number}")
        store.save([event_kit.completion(event)], {event.id: NOBODY_LISTENS})
    await asyncio.to_thread(queue.enqueue, ["job-0:1:succeeded"])
    await asyncio.to_thread(queue.put_back, "job-1:1:succeeded", datetime.now(UTC) + timedelta(seconds=0.5))
    environment = {"REDIS_URL": guarded.url("webhooks"), "DATABASE_URL": database, "WEBHOOK_SECRET": SECRET}
    environment |= {"WEBHOOK_ALLOWED_HOSTS": "127.0.0.1", "LORA_ALLOW_LOOPBACK": "true"}
    async with a_worker(environment, "--burst") as work:
        status, said = await work.until_ended()
    assert status == 0, said
    rows = Deliveries(engine)
    first = rows.get("job-0:1:succeeded")
    assert first is not None
    assert (first.attempts, first.error) == (1, "no connection")
    await asyncio.to_thread(Sweeper(queue, rows, grace_s=-60).sweep)
    queue.close()
    engine.dispose()
    assert await refused(admin) == []


async def two_dead_and_one_waiting(ann: Ender, url: str) -> None:
    async with a_client(url, KEYS) as client:
        for name in ("a", "b"):
            await a_dead_job(client, ann, name)
        await client.submit(job_id="waits", prompt="a fox", tenant="t")
    await ann.redis.xgroup_create(KEYS.completions, "forgotten", id="0")
    await ann.presence.heartbeat({"gpu": "fake"})


def test_an_operator_looks_replays_drops_and_examines(guarded: Guarded, operator: Cli) -> None:
    consume(guarded.admin_url, KEYS, lambda ann: two_dead_and_one_waiting(ann, guarded.admin_url))
    replayed, dropped = (letter["entry_id"] for letter in operator.run_json("dead", "list"))
    commands = ["stats", "status a", f"dead show {replayed}", f"dead replay {replayed}", f"dead drop {dropped}"]
    commands += ["cancel a", "cancel waits", "listen --drop-group forgotten", "webhooks list"]
    for command in commands:
        operator.run(*command.split())
        assert operator.status == 0, (command, operator.err)
    operator.run("wait", "waits")
    assert operator.status == 1, operator.err  # it was cancelled
    findings = operator.run_json("doctor")
    assert "fail" not in [finding["verdict"] for finding in findings]
    assert [finding for finding in findings if "ACL" in finding["found"]] == []
    log = consume(guarded.admin_url, KEYS, lambda ann: refused(ann.redis))
    assert log == ["sdxl-operator: config"]  # CONFIG GET would tell every password: doctor does without


def test_an_operator_brings_webhooks_back(guarded: Guarded, operator: Cli, tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        event = event_kit.succeeded()
        store.save([event_kit.completion(event)], {event.id: NOBODY_LISTENS})
    for _ in range(2):  # the second time RQ has it already
        operator.run("webhooks", "retry", event.id)
        assert operator.status == 0, operator.err
    assert consume(guarded.admin_url, KEYS, lambda ann: refused(ann.redis)) == []


# Nobody needs these, and each would hurt: what a server keeps of everybody, and what stops it.
DANGEROUS = {
    "flush the database": "FLUSHALL",
    "flush one": "FLUSHDB",
    "list all keys": "KEYS *",
    "walk all keys": "SCAN 0",
    "read the configuration": "CONFIG GET *",
    "change the configuration": "CONFIG SET maxmemory 1",
    "crash it": "DEBUG SLEEP 0",
    "stop it": "SHUTDOWN NOSAVE",
    "kill a script": "SCRIPT KILL",
    "forget the scripts": "SCRIPT FLUSH",
    "run any text as a script": "EVAL return(1) 0",
    "watch the commands of others": "MONITOR",
    "kill the connections of others": "CLIENT KILL TYPE normal",
    "list the connections of others": "CLIENT LIST",
    "read the users": "ACL LIST",
    "make a user": "ACL SETUSER eve on nopass ~* +@all",
    "make it a replica": "REPLICAOF 127.0.0.1 1",
    "move a key to another server": "MIGRATE 127.0.0.1 1 k 0 1",
    "rename a key": "RENAME {sdxl}:job:a {sdxl}:job:b",
    "delete another program's key": "DEL sessions",
    "delete under another prefix": "DEL {other}:job:a",
    "read under another prefix": "HGET {sdxl2}:job:a payload",
    "listen to a channel": "SUBSCRIBE anything",
}
FORBIDDEN = {
    "publisher": {
        "take a job": "XREADGROUP GROUP consumers eve STREAMS {sdxl}:requests:high >",
        "claim a job": "XCLAIM {sdxl}:requests:high consumers eve 0 0-1",
        "bury or read dead letters": "XADD {sdxl}:dead * raw x",
        "destroy a group": "XGROUP DESTROY {sdxl}:completions listeners",
        "play a consumer": "HSET {sdxl}:consumers:eve state idle",
        "touch the counters": "DEL {sdxl}:counters",
        "touch the webhooks": "DEL rq:queue:sdxl-webhooks",
    },
    "consumer": {
        "read the completions": "XREAD STREAMS {sdxl}:completions 0",
        "destroy a group": "XGROUP DESTROY {sdxl}:completions listeners",
        "ask for a cancellation": "SET {sdxl}:cancel:a 1",
        "read a whole job": "HGETALL {sdxl}:job:a",
        "play a waiter": "ZADD {sdxl}:waiters:a 1 eve",
        "touch the webhooks": "DEL rq:queue:sdxl-webhooks",
    },
    "listener": {
        "take a job": "XREADGROUP GROUP consumers eve STREAMS {sdxl}:requests:high >",
        "submit a job": "XADD {sdxl}:requests:high * payload {}",
        "publish an event": "XADD {sdxl}:completions * payload {}",
        "ask for a cancellation": "SET {sdxl}:cancel:a 1",
        "forget a job": "DEL {sdxl}:job:a",
        "destroy a group": "XGROUP DESTROY {sdxl}:completions listeners",
        "read dead letters": "XRANGE {sdxl}:dead - +",
        "read the results of webhooks": "XRANGE rq:results:a - +",
    },
    "webhooks": {
        "read a job": "HGET {sdxl}:job:a payload",
        "publish an event": "XADD {sdxl}:completions * payload {}",
        "take an event": "XREADGROUP GROUP listeners eve STREAMS {sdxl}:completions >",
        "submit a job": "XADD {sdxl}:requests:high * payload {}",
    },
    "operator": {
        "take a job": "XREADGROUP GROUP consumers eve STREAMS {sdxl}:requests:high >",
        "claim a job": "XCLAIM {sdxl}:requests:high consumers eve 0 0-1",
    },
}
CASES = [
    pytest.param(role, command, id=f"{role}: {what}")
    for role in ROLES
    for what, command in (DANGEROUS | FORBIDDEN[role]).items()
]


@pytest.mark.parametrize(("role", "command"), CASES)
def test_whatever_else_a_role_might_do_is_refused(guarded_server: Guarded, role: str, command: str) -> None:
    """Guards the role's line in the document: `+@all`, or `~*`, there makes this red."""
    with BlockingRedis.from_url(guarded_server.url(role)) as redis, pytest.raises(NoPermissionError):
        redis.execute_command(*command.split())


@pytest.mark.parametrize("role", ROLES)
def test_a_script_has_no_more_rights_than_its_caller(guarded_server: Guarded, role: str) -> None:
    with BlockingRedis.from_url(guarded_server.url(role)) as redis:
        digest = redis.script_load("return redis.call('FLUSHALL')")
        with pytest.raises(ResponseError, match=r"The user executing the script|ACL failure"):
            redis.evalsha(digest, 0)
        assert redis.ping()


def test_nobody_gets_in_without_a_password(guarded_server: Guarded) -> None:
    with BlockingRedis.from_url(guarded_server.server.url) as redis, pytest.raises(AuthenticationError):
        redis.ping()


@pytest.mark.parametrize("arguments", ["stats", "stats --json", "dead list", "listen --once"])
def test_a_command_with_another_roles_user_ends_with_status_3_and_one_line(
    guarded: Guarded, operator: Cli, arguments: str
) -> None:
    out = operator.run(*arguments.split(), REDIS_URL=guarded.url("webhooks"))
    told = out if "--json" in arguments else operator.err
    assert operator.status == 3
    assert "no permissions" in told
    assert "Traceback" not in operator.err
    assert password("webhooks") not in out + operator.err


@pytest.mark.parametrize("role", ROLES)
def test_doctor_fails_no_check_that_a_role_may_not_make(guarded: Guarded, operator: Cli, role: str) -> None:
    findings = operator.run_json("doctor", REDIS_URL=guarded.url(role))
    assert [finding for finding in findings if finding["verdict"] == "fail"] == []
    assert password(role) not in operator.out + operator.err
