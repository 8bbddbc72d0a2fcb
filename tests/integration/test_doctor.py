"""`doctor` on real servers: healthy ones, ones with other settings, ones that are away, and a store that is lax."""

import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from redis import Redis
from rq import Worker
from sqlalchemy import text

from consumer.queue import Presence
from demo.servers import RedisServer, S3Server, redis_server
from producer.database import migrate, open_engine
from producer.doctor.examination import examine
from producer.doctor.findings import Finding, Verdict
from producer.settings import ProducerSettings
from producer.webhooks.queue import WebhookQueue
from schemas.keys import Keys
from tests import event_kit
from tests.integration.cli_kit import Cli, a_cli
from tests.postgres import PostgresServer
from tests.s3_stub import S3Stub

BUCKET = "looked-into"
WEBHOOK_SECRET = "whsec_Y2FuYXJ5LWNhbmFyeS1jYW5hcnktY2FuYXJ5LTEyMzQ="
NO_WARNING = {"ok", "skipped"}


@pytest.fixture(scope="module")
def sound_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """With an AOF and a password."""
    options = ("--appendonly", "yes", "--appendfsync", "everysec", "--requirepass", "canary-password")
    with redis_server(tmp_path_factory.mktemp("redis"), *options) as server:
        yield server


@pytest.fixture(scope="module")
def store(s3_at: S3Server) -> S3Server:
    s3_at.create_bucket(BUCKET)
    return s3_at


@pytest.fixture
def doctor(sound_redis: RedisServer, keys: Keys, tmp_path: Path) -> Iterator[Cli]:
    """Everything but the storage is there and well, and every setting that may hold a secret holds a canary."""
    with a_cli(sound_redis, keys, tmp_path) as cli:
        cli.environment |= {
            "REDIS_URL": f"redis://:canary-password@127.0.0.1:{sound_redis.port}/0",
            "MODAL_API_TOKEN": "canary-api-token-of-some-length",
            "WEBHOOK_SECRET": WEBHOOK_SECRET,
        }
        engine = open_engine(cli.environment["DATABASE_URL"])
        migrate(engine)
        engine.dispose()
        yield cli


@pytest.fixture
def storing(doctor: Cli, store: S3Server) -> Cli:
    """With a storage too."""
    doctor.environment |= {
        "R2_ENDPOINT_URL": store.url,
        "R2_BUCKET_NAME": BUCKET,
        "R2_ACCESS_KEY_ID": "canary-access-key",
        "R2_SECRET_ACCESS_KEY": "canary-secret-key",
        "LORA_ALLOW_LOOPBACK": "true",
    }
    return doctor


def found(cli: Cli, **environment: str) -> dict[str, Any]:
    """The findings by area and check, none of which tells a secret."""
    findings = cli.run_json("doctor", **environment)
    check_no_secret(cli)
    return {f"{finding['area']}: {finding['check']}": finding for finding in findings}


def found_twice(cli: Cli, **environment: str) -> dict[str, Any]:
    """The same, once the table has told the same, without a secret too."""
    findings = found(cli, **environment)
    status, table = cli.status, cli.run("doctor", **environment)
    assert cli.status == status
    check_no_secret(cli)
    for name, finding in findings.items():
        assert any(line.startswith(finding["verdict"]) and name in line for line in table.splitlines())
    return findings


def check_no_secret(cli: Cli) -> None:
    for secret in ("canary", WEBHOOK_SECRET.removeprefix("whsec_")):
        assert secret not in cli.out + cli.err


def verdicts(findings: dict[str, Any], area: str) -> dict[str, str]:
    return {name: finding["verdict"] for name, finding in findings.items() if finding["area"] == area}


def raw(cli: Cli, do: Callable[[Redis], Any]) -> Any:
    with Redis.from_url(cli.environment["REDIS_URL"]) as redis:
        return do(redis)


def objects(store: S3Server) -> int:
    client = store.client()
    try:
        return int(client.list_objects_v2(Bucket=BUCKET)["KeyCount"])
    finally:
        client.close()


def test_where_all_is_well_nothing_fails_and_nothing_stays_behind(storing: Cli, store: S3Server) -> None:
    findings = found_twice(storing)
    assert storing.status == 0
    warned = {name for name, finding in findings.items() if finding["verdict"] not in NO_WARNING}
    assert warned == {"webhooks: workers"}  # there is a secret, and nobody works
    assert verdicts(findings, "storage") == dict.fromkeys(
        (f"storage: {check}" for check in ("write", "clock", "presigned GET", "If-None-Match", "If-Match")), "ok"
    )
    assert findings["database: tables"]["verdict"] == "ok"
    assert "everysec" in findings["redis: persistence"]["found"]
    assert objects(store) == 0
    assert raw(storing, lambda redis: redis.keys(f"{{{storing.keys.prefix}}}*")) == []


@pytest.mark.parametrize(
    ("options", "check", "verdict"),
    [
        (("--maxmemory-policy", "allkeys-lru"), "maxmemory-policy", "fail"),
        (("--maxmemory", "2mb"), "memory", "ok"),
        (("--appendonly", "no"), "persistence", "warn"),
    ],
)
def test_a_redis_with_dangerous_settings_is_told_apart(
    tmp_path: Path, keys: Keys, options: tuple[str, ...], check: str, verdict: str
) -> None:
    with redis_server(tmp_path, *options) as server, a_cli(server, keys, tmp_path) as cli:
        finding = found(cli)[f"redis: {check}"]
        assert finding["verdict"] == verdict
        assert cli.status == (1 if verdict == "fail" else 0)


def test_a_user_who_may_not_ask_skips_checks_and_fails_none(doctor: Cli, sound_redis: RedisServer) -> None:
    rules: dict[str, Any] = {
        "passwords": ["+canary-narrow"],
        "keys": ["*"],
        "categories": ["+@all"],
        "commands": ["-info", "-config", "-xinfo"],
    }
    raw(doctor, lambda redis: redis.acl_setuser("narrow", enabled=True, **rules))
    findings = found_twice(doctor, REDIS_URL=f"redis://narrow:canary-narrow@127.0.0.1:{sound_redis.port}/0")
    assert doctor.status == 0
    assert set(verdicts(findings, "redis").values()) == {"ok", "skipped"}
    assert findings["redis: version"]["verdict"] == "skipped"
    assert findings["queue: request groups"]["verdict"] == "skipped"
    assert findings["queue: dead letters"]["verdict"] == "ok"


@pytest.mark.parametrize("user", [":canary-wrong", "nobody:canary-password"])
def test_a_wrong_password_is_out_of_reach_and_not_repeated(doctor: Cli, sound_redis: RedisServer, user: str) -> None:
    findings = found_twice(doctor, REDIS_URL=f"redis://{user}@127.0.0.1:{sound_redis.port}/0")
    assert doctor.status == 3
    assert verdicts(findings, "redis") == {"redis: reach": "fail", "redis: all else": "skipped"}
    assert findings["database: tables"]["verdict"] == "ok"


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "https://canary.example", "redis://127.0.0.1/0?canary=1"])
def test_a_redis_that_is_away_or_none_leaves_the_other_checks_alone(storing: Cli, url: str) -> None:
    findings = found_twice(storing, REDIS_URL=url)
    assert storing.status == 3
    assert findings["redis: reach"]["out_of_reach"]
    assert findings["database: tables"]["verdict"] == "ok"
    assert findings["storage: write"]["verdict"] == "ok"


async def test_a_redis_that_answers_nothing_is_out_of_reach_at_a_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.doctor.redis_server._REACH_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        findings = await examine(settings(REDIS_URL=url, DATABASE_URL=f"sqlite:///{tmp_path / 'x.db'}"))
    (reach,) = (finding for finding in findings if finding.check == "reach" and finding.area == "redis")
    assert (reach.verdict, reach.out_of_reach) == (Verdict.FAIL, True)


def test_jobs_that_no_consumer_has_ever_read_are_told(doctor: Cli) -> None:
    doctor.run("publish", "a fox")
    findings = found(doctor)
    assert findings["queue: request groups"]["verdict"] == "warn"
    assert findings["consumers: backlog"]["verdict"] == "warn"
    assert findings["consumers: backlog"]["found"] == "1 waiting or running, 0 consumers live"


def test_a_full_queue_fails(doctor: Cli) -> None:
    doctor.run("publish", "a fox")
    assert found(doctor, SDXL_MAX_QUEUE="1")["consumers: backlog"]["verdict"] == "fail"
    assert doctor.status == 1


def beat(cli: Cli, name: str, **record: str) -> None:
    async def heartbeat(ann: Any) -> None:
        await Presence(ann.redis, ann.keys, name).heartbeat(record)

    cli.consume(heartbeat)


def test_a_consumer_whose_model_did_not_load_is_told_with_its_reason(doctor: Cli) -> None:
    beat(doctor, "ann", state="failed", model="/models/x", error="The model cannot be loaded: no model_index.json")
    finding = found(doctor)["consumers: start"]
    assert (finding["verdict"], doctor.status) == ("fail", 1)
    assert "no model_index.json" in finding["found"]
    beat(doctor, "bob", state="idle", model="sdxl")
    findings = found(doctor)
    assert findings["consumers: start"]["verdict"] == "warn"  # somebody draws
    assert findings["consumers: model"]["found"] == "loaded: sdxl"
    assert doctor.status == 0


def test_consumers_with_different_models_are_told(doctor: Cli) -> None:
    beat(doctor, "ann", state="idle", model="sdxl")
    beat(doctor, "bob", state="idle", model="turbo")
    assert found(doctor)["consumers: model"]["verdict"] == "warn"


def test_a_model_folder_is_looked_at_where_no_consumer_lives(doctor: Cli, tmp_path: Path) -> None:
    assert found(doctor, SDXL_MODEL=str(tmp_path))["consumers: model"]["verdict"] == "fail"
    assert found(doctor, SDXL_MODEL="hub/model")["consumers: model"]["verdict"] == "ok"


def test_dead_letters_are_counted(doctor: Cli) -> None:
    doctor.run("publish", "a fox")
    doctor.consume(lambda ann: ann.fail_next())
    finding = found(doctor)["queue: dead letters"]
    assert (finding["verdict"], finding["found"]) == ("warn", "1")


def test_a_group_that_nobody_reads_for_is_named(doctor: Cli) -> None:
    stream, old = doctor.keys.completions, "1000-1"
    payload = event_kit.started("job-1").encode()
    raw(doctor, lambda redis: redis.xadd(stream, {"type": "generation.started", "payload": payload}, id=old))
    assert "events kept until somebody does: 1" in found(doctor)["queue: listeners"]["found"]
    raw(doctor, lambda redis: redis.xgroup_create(stream, "gone", id="0"))
    unread = found(doctor)["queue: listeners gone"]
    assert unread["verdict"] == "warn"
    assert "--drop-group" in unread["hint"]
    raw(doctor, lambda redis: redis.xreadgroup("gone", "ann", {stream: ">"}))
    assert found(doctor)["queue: listeners gone"]["verdict"] == "warn"
    raw(doctor, lambda redis: redis.xack(stream, "gone", old))
    assert found(doctor)["queue: listeners gone"]["found"] == "has every event"


def test_a_bucket_that_does_not_exist_fails(storing: Cli) -> None:
    finding = found(storing, R2_BUCKET_NAME="nowhere")["storage: write"]
    assert (storing.status, finding["verdict"]) == (1, "fail")
    assert finding["found"] == "the storage answered 404 NoSuchBucket"


def test_a_storage_out_of_reach_ends_with_status_3(storing: Cli) -> None:
    findings = found_twice(storing, R2_ENDPOINT_URL="http://canary:canary@127.0.0.1:1")
    assert storing.status == 3
    assert verdicts(findings, "storage") == {"storage: write": "fail"}
    assert findings["redis: reach"]["verdict"] == "ok"


def test_half_a_storage_configuration_names_what_is_missing(storing: Cli) -> None:
    finding = found_twice(storing, R2_SECRET_ACCESS_KEY="", R2_BUCKET_NAME="")["storage: settings"]
    assert (finding["verdict"], finding["found"]) == ("fail", "R2_BUCKET_NAME, R2_SECRET_ACCESS_KEY not set")


def test_without_a_storage_its_checks_are_skipped(cli: Cli) -> None:
    assert found(cli)["storage: settings"]["verdict"] == "skipped"
    assert cli.status == 0


def test_an_endpoint_that_consumers_would_refuse_fails_the_presigned_get_alone(storing: Cli) -> None:
    checks = verdicts(found(storing, LORA_ALLOW_LOOPBACK="false"), "storage")
    assert checks.pop("storage: presigned GET") == "fail"
    assert set(checks.values()) == {"ok"}


def settings(**environment: str) -> ProducerSettings:
    return ProducerSettings.model_validate(environment)


async def storage_findings(url: str, redis_at: RedisServer, tmp_path: Path) -> dict[str, Finding]:
    findings = await examine(
        settings(
            REDIS_URL=redis_at.url,
            DATABASE_URL=f"sqlite:///{tmp_path / 'events.db'}",
            R2_ENDPOINT_URL=url,
            R2_BUCKET_NAME=BUCKET,
            R2_ACCESS_KEY_ID="canary",
            R2_SECRET_ACCESS_KEY="canary",
            LORA_ALLOW_LOOPBACK="true",
        )
    )
    return {finding.check: finding for finding in findings if finding.area == "storage"}


async def test_wrong_credentials_are_told_as_such(redis_at: RedisServer, stub: S3Stub, tmp_path: Path) -> None:
    findings = await storage_findings(stub.url, redis_at, tmp_path)
    assert findings["write"].verdict is Verdict.FAIL
    assert findings["write"].found == "the storage answered 403 SignatureDoesNotMatch"
    assert "R2_ACCESS_KEY_ID" in (findings["write"].hint or "")
    assert [seen.method for seen in stub.seen] == ["PUT"]


class LaxStore:
    """Stores what comes, whatever the conditions. `ignores`: headers that it does not heed. `refuses`: methods."""

    def __init__(self) -> None:
        self.url = ""
        self.ignores: set[str] = set()
        self.refuses: set[str] = set()
        self.ahead_s = 0.0
        self.objects: dict[str, bytes] = {}

    async def handle(self, request: web.Request) -> web.Response:
        headers = {"Date": formatdate(time.time() + self.ahead_s, usegmt=True)}
        body = await request.read()
        if request.method in self.refuses:
            return web.Response(status=501, text="<Error><Code>NotImplemented</Code></Error>", headers=headers)
        if request.method == "PUT":
            if self._is_unmet(request):
                return web.Response(status=412, headers=headers)
            self.objects[request.path] = body
            return web.Response(headers=headers | {"ETag": '"one"'})
        if request.method == "DELETE":
            self.objects.pop(request.path, None)
            return web.Response(status=204, headers=headers)
        return web.Response(body=self.objects[request.path], headers=headers)

    def _is_unmet(self, request: web.Request) -> bool:
        given = {name: request.headers.get(name) for name in {"If-None-Match", "If-Match"} - self.ignores}
        if given.get("If-None-Match") and request.path in self.objects:
            return True
        return given.get("If-Match") not in (None, '"one"')


@pytest.fixture
async def lax() -> AsyncIterator[LaxStore]:
    store = LaxStore()
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", store.handle)
    runner = web.AppRunner(application)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        store.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield store
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("header", ["If-None-Match", "If-Match"])
async def test_a_store_that_ignores_a_condition_fails_that_check_alone(
    redis_at: RedisServer, lax: LaxStore, tmp_path: Path, header: str
) -> None:
    lax.ignores = {header}
    findings = await storage_findings(lax.url, redis_at, tmp_path)
    assert [name for name, finding in findings.items() if finding.verdict is not Verdict.OK] == [header]
    assert "ignored" in findings[header].found
    assert lax.objects == {}


async def test_an_object_that_cannot_be_deleted_is_named(redis_at: RedisServer, lax: LaxStore, tmp_path: Path) -> None:
    lax.refuses = {"DELETE"}
    findings = await storage_findings(lax.url, redis_at, tmp_path)
    (path,) = lax.objects
    assert findings["delete"].verdict is Verdict.WARN
    assert path.removeprefix(f"/{BUCKET}/") in findings["delete"].found


@pytest.mark.parametrize(("ahead_s", "verdict"), [(-120.0, Verdict.WARN), (3600.0, Verdict.FAIL)])
async def test_a_clock_that_is_apart_from_the_storages_is_told(
    redis_at: RedisServer, lax: LaxStore, tmp_path: Path, ahead_s: float, verdict: Verdict
) -> None:
    lax.ahead_s = ahead_s
    finding = (await storage_findings(lax.url, redis_at, tmp_path))["clock"]
    assert finding.verdict is verdict


def test_a_database_that_is_not_there_yet_is_not_made(doctor: Cli, tmp_path: Path) -> None:
    path = tmp_path / "new.db"
    finding = found(doctor, DATABASE_URL=f"sqlite:///{path}")["database: reach"]
    assert (finding["verdict"], path.exists()) == ("warn", False)


@pytest.mark.parametrize(
    ("url", "verdict"),
    [
        ("mysql://root:canary@localhost/x", "fail"),
        ("canary", "fail"),
        ("sqlite:////nowhere/at/all.db", "warn"),
        ("postgresql://me:canary@127.0.0.1:1/x", "fail"),
    ],
)
def test_a_database_of_no_use_is_told_without_its_url(doctor: Cli, url: str, verdict: str) -> None:
    assert found_twice(doctor, DATABASE_URL=url)["database: reach"]["verdict"] == verdict
    assert doctor.status == (1 if verdict == "fail" else 0)


def test_an_older_and_a_newer_database_are_told_apart(doctor: Cli) -> None:
    engine = open_engine(doctor.environment["DATABASE_URL"])
    for version, verdict in (("0001", "warn"), ("9999", "fail")):
        with engine.begin() as connection:
            connection.execute(text("UPDATE sdxl_alembic_version SET version_num = :v"), {"v": version})
        assert found(doctor)["database: tables"]["verdict"] == verdict
    engine.dispose()


def test_a_postgresql_without_tables_is_told(doctor: Cli, postgres_at: PostgresServer) -> None:
    url = postgres_at.create_database()
    findings = found(doctor, DATABASE_URL=url)
    assert findings["database: reach"]["found"] == "postgresql answers"
    assert (findings["database: tables"]["verdict"], findings["database: tables"]["found"]) == ("warn", "none yet")


@pytest.mark.parametrize(("state", "verdict"), [("failed", "warn"), ("pending", "warn"), ("delivered", "ok")])
def test_webhooks_that_failed_or_are_overdue_are_counted(doctor: Cli, state: str, verdict: str) -> None:
    engine = open_engine(doctor.environment["DATABASE_URL"])
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO deliveries (event_id, job_id, url, state, attempts, due_at, created_at)"
                " VALUES ('e', 'j', 'https://hook.example', :state, 1, :past, :past)"
            ),
            {"state": state, "past": "2020-01-01 00:00:00.000000"},
        )
    engine.dispose()
    finding = found(doctor)["webhooks: deliveries"]
    assert finding["verdict"] == verdict
    assert finding["found"].startswith(f"1 {state}")


def test_a_worker_for_webhooks_is_found_and_missed_where_it_is_needed(doctor: Cli) -> None:
    assert found(doctor)["webhooks: workers"]["verdict"] == "warn"
    assert found(doctor, WEBHOOK_SECRET="")["webhooks: workers"]["verdict"] == "skipped"
    queue = WebhookQueue(doctor.environment["REDIS_URL"], doctor.keys.prefix)
    worker: Any = Worker([queue.rq], connection=queue.rq.connection)
    worker.register_birth()
    assert found(doctor)["webhooks: workers"]["verdict"] == "ok"
    worker.register_death()
    queue.enqueue(["job-1:1:succeeded"])
    finding = found(doctor, WEBHOOK_SECRET="")["webhooks: workers"]
    assert (finding["verdict"], finding["found"]) == ("warn", "none lives, 1 deliveries waiting")
    queue.discard("job-1:1:succeeded")
    queue.close()


def test_a_settings_error_ends_with_status_2(doctor: Cli) -> None:
    doctor.run("doctor", SDXL_MAX_QUEUE="canary")
    assert doctor.status == 2
    assert "canary" not in doctor.out + doctor.err
