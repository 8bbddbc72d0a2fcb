"""A canary in every secret, and a search through everything that is left behind or shown."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from demo.servers import RedisServer, S3Server, redis_server
from producer.database import open_engine
from producer.tables import METADATA
from producer.webhooks.queue import WebhookQueue
from schemas.keys import Keys, Priority
from tests.integration.cli_kit import Cli
from tests.integration.client_kit import a_client
from tests.integration.queue_kit import a_request, add, completions, entries
from tests.integration.webhook_kit import a_worker
from tests.postgres import PostgresServer
from tests.s3_stub import S3Stub, content, status

CANARY = "c4n4ry"
PASSWORD = f"{CANARY}Password"
SECRET = "whsec_" + f"{CANARY}SecretXX" * 3
SIGNED = f"X-Amz-Date={datetime.now(UTC):%Y%m%dT%H%M%SZ}&X-Amz-Expires=600&X-Amz-Signature={CANARY}"
KEYS = Keys("canary")
BUCKET = "canary-pictures"
CONSUMER = """
from consumer.__main__ import main
from consumer.errors import LoraInvalid
from tests.fakes import FakeEngine

class Engine(FakeEngine):
    def generate(self, request, loras, on_step):
        if request.prompt == "crash":
            raise ZeroDivisionError(f"drawing with {request.lora_url} as {request!r}")
        if request.prompt == "broken":
            raise LoraInvalid(f"{request.lora_url} is broken", details={"url": request.lora_url})
        return super().generate(request, loras, on_step)

main(lambda settings: Engine())
"""


@dataclass
class Everything:
    """What was said and shown so far, by name."""

    environment: dict[str, str]
    redis: Redis
    stub: S3Stub
    said: dict[str, bytes] = field(default_factory=dict)

    async def run(self, *command: str, stdin: bytes | None = None) -> None:
        """A process of the producer's; what it writes is kept."""
        async with self.start("-m", "producer", *command) as process:
            out, _ = await asyncio.wait_for(process.communicate(stdin), 15)
        self.said[" ".join(command)] = out

    @asynccontextmanager
    async def start(self, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *arguments),
            env=os.environ | self.environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    @asynccontextmanager
    async def consuming(self, name: str) -> AsyncIterator[None]:
        """`python -m consumer` with a fake GPU; what it writes is kept."""
        async with self.start("-c", CONSUMER) as process:
            yield
            process.terminate()
            self.said[name], _ = await asyncio.wait_for(process.communicate(), 40)

    async def ended(self, *job_ids: str, run: int = 1) -> dict[str, str]:
        """Each job's terminal event's code, when all of these have one."""
        async with asyncio.timeout(40):
            while True:
                events = [event for event in await completions(self.redis, KEYS) if event["data"]["run"] == run]
                kinds = {
                    event["data"]["job_id"]: event["data"].get("error_code") or "succeeded"
                    for event in events
                    if event["type"].split(".")[1] in ("succeeded", "failed", "cancelled")
                }
                if kinds.keys() >= set(job_ids):
                    return kinds
                await asyncio.sleep(0.05)


@pytest.fixture
async def everything(
    tmp_path: Path, stub: S3Stub, s3_at: S3Server, postgres_at: PostgresServer
) -> AsyncIterator[Everything]:
    s3_at.create_bucket(BUCKET)
    (tmp_path / "redis").mkdir()
    with redis_server(tmp_path / "redis", "--requirepass", PASSWORD) as server:
        url = f"redis://:{PASSWORD}@127.0.0.1:{server.port}/0"
        environment = {
            "REDIS_URL": url,
            "SDXL_PREFIX": KEYS.prefix,
            "SDXL_RETRY_BASE_SECONDS": "0.01",
            "SDXL_MAX_ATTEMPTS": "2",
            "DATABASE_URL": postgres_at.create_database().replace("postgres@", f"postgres:{PASSWORD}@"),
            "WEBHOOK_SECRET": SECRET,
            "WEBHOOK_ALLOWED_HOSTS": "127.0.0.1",
            "MODAL_API_TOKEN": f"{CANARY}-token",
            "HUGGINGFACE_HUB_TOKEN": f"hf_{CANARY}",
            "R2_ACCESS_KEY_ID": f"{CANARY}-id",
            "R2_SECRET_ACCESS_KEY": f"{CANARY}-key",
            "R2_BUCKET_NAME": BUCKET,
            "R2_ENDPOINT_URL": s3_at.url,
            "LORA_ALLOWED_HOSTS": "127.0.0.1,nowhere.invalid",
            "UPLOAD_ALLOWED_HOSTS": "127.0.0.1",
            "LORA_ALLOW_LOOPBACK": "true",
            "LORA_CACHE_DIR": str(tmp_path / "cache"),
        }
        redis = Redis.from_url(url)
        yield Everything(environment, redis, stub)
        await redis.aclose()


def requests(stub: S3Stub) -> dict[str, tuple[dict[str, Any], str]]:
    """Fields of jobs, each with canaries in its URLs, and what becomes of it."""
    lora, tls = f"{stub.url}/loras", stub.url.replace("http:", "https:")
    signed = f"{lora}/fox.safetensors?{SIGNED}"
    hook = {"webhook_url": f"{stub.url}/hook?{SIGNED}"}
    return {
        "fine": ({"lora_url": signed, "upload_url": f"{stub.url}/put?{SIGNED}", **hook}, "succeeded"),
        "several": ({"loras": [{"url": signed}, {"url": f"{lora}/b?{SIGNED}"}], **hook}, "succeeded"),
        "stored": (hook, "succeeded"),
        "forbidden": ({"lora_url": f"{lora}/403?{SIGNED}", **hook}, "LORA_DOWNLOAD_FAILED"),
        "missing": ({"lora_url": f"{lora}/404?{SIGNED}"}, "LORA_DOWNLOAD_FAILED"),
        "failing": ({"lora_url": f"{lora}/500?{SIGNED}"}, "LORA_DOWNLOAD_FAILED"),
        "tls": ({"lora_url": f"{tls}/loras/fox?{SIGNED}"}, "LORA_DOWNLOAD_FAILED"),
        "dns": ({"lora_url": f"https://nowhere.invalid/fox?{SIGNED}"}, "LORA_DOWNLOAD_FAILED"),
        "elsewhere": ({"lora_url": f"https://evil.example/fox?{SIGNED}"}, "LORA_DOWNLOAD_FAILED"),
        "broken": ({"prompt": "broken", "lora_url": signed}, "LORA_LOAD_FAILED"),
        "crash": ({"prompt": "crash", "lora_url": signed}, "INTERNAL"),
        "upload": ({"upload_url": f"{stub.url}/put403?{SIGNED}"}, "UPLOAD_FAILED"),
        "late": ({"lora_url": signed, "expires_at": "2020-01-01T00:00:00Z"}, "EXPIRED"),
        "hook-tls": ({"webhook_url": f"{tls}/hook?{SIGNED}"}, "succeeded"),
        "hook-500": ({"webhook_url": f"{stub.url}/hook500?{SIGNED}"}, "succeeded"),
        "userinfo": ({"lora_url": f"https://user:{CANARY}@127.0.0.1/fox"}, "INVALID_REQUEST"),
        "unknown-field": ({"loraUrl": signed}, "INVALID_REQUEST"),
    }


async def submit_everything(all_of_it: Everything) -> dict[str, str]:
    """Returns what is to become of each job. Bare XADDs, and some from the client."""
    stub, redis, stream = all_of_it.stub, all_of_it.redis, KEYS.requests(Priority.NORMAL)
    for path in ("/loras/fox.safetensors", "/loras/b"):
        stub.answer(path, content(b"weights"))
    for path, code in (("403", 403), ("404", 404), ("500", 500)):
        stub.answer(f"/loras/{path}", status(code))
    stub.answer("/put", status(200))
    stub.answer("/put403", status(403))
    stub.answer("/hook", status(204))
    stub.answer("/hook500", status(500))
    expected = {}
    for name, (fields, outcome) in requests(stub).items():
        payload = {"job_id": name, "prompt": "a red fox", "steps": 20, **fields}
        await add(redis, stream, {"payload": json.dumps(payload)})
        expected[name] = outcome
    await add(redis, stream, {"payload": f"not JSON https://h/x?{SIGNED}", "job_id": "no-json"})
    await add(redis, stream, {"payload": b"\xff https://h/x?" + SIGNED.encode()})
    async with a_client(all_of_it.environment["REDIS_URL"], KEYS) as client:
        await client.submit(a_request("cancelled", lora_url=f"https://127.0.0.1/fox?{SIGNED}"))
        assert CANARY.encode() in await everything_in_redis(redis)
        await client.cancel("cancelled")
    return {**expected, "no-json": "INVALID_REQUEST", "cancelled": "CANCELLED"}


async def everything_in_redis(redis: Redis) -> bytes:
    """All names and all values, read by type: a dump may be compressed."""
    read: dict[bytes, Callable[[bytes], Awaitable[Any]]] = {
        b"string": redis.get,
        b"hash": redis.hgetall,
        b"set": redis.smembers,
        b"stream": redis.xrange,
        b"list": lambda key: redis.lrange(key, 0, -1),
        b"zset": lambda key: redis.zrange(key, 0, -1),
    }
    found = []
    async for key in redis.scan_iter():
        kind: Any = await redis.type(key)
        found.append((key, await read[kind](key)))
    return repr(found).encode()


def everything_in_the_database(url: str) -> bytes:
    engine = open_engine(url)
    with engine.connect() as connection:
        rows = [list(connection.execute(table.select())) for table in METADATA.tables.values()]
    engine.dispose()
    return repr(rows).encode()


def everything_in_the_bucket(s3: S3Server) -> bytes:
    client = s3.client()
    keys = [found["Key"] for found in client.list_objects_v2(Bucket=BUCKET).get("Contents", [])]
    objects = [client.get_object(Bucket=BUCKET, Key=key) for key in keys]
    found = [(key, stored["Metadata"], stored["Body"].read()) for key, stored in zip(keys, objects, strict=True)]
    client.close()
    return repr(found).encode()


def look_with_every_command(all_of_it: Everything, cli: Cli, letter: str) -> None:
    """In this process, which is quicker."""
    looks = ["stats --json", "doctor", "dead list", "dead list --json", f"dead show {letter} --json"]
    looks += ["status crash --json", "wait fine --json", "webhooks list"]
    for look in looks:
        out = cli.run(*look.split(), **all_of_it.environment)
        all_of_it.said[look] = (out + cli.err).encode()


async def ask_a_gateway(all_of_it: Everything) -> None:
    headers = {"Authorization": f"Bearer {CANARY}-token"}
    async with all_of_it.start("-m", "producer", "serve", "--port", "0", "--json") as process:
        assert process.stdout is not None
        async with asyncio.timeout(40):
            said = await process.stdout.readline()
            while b'"url"' not in said:
                said = await process.stdout.readline()
        async with httpx.AsyncClient(base_url=json.loads(said)["url"], headers=headers) as http:
            lora = f"https://127.0.0.1/fox?{SIGNED}"
            answers = [
                await http.get("/health", params={"token": CANARY}),
                await http.get("/v1/jobs/crash"),
                await http.post("/v1/jobs", json={"prompt": "a fox", "lora_url": f"https://u:{CANARY}@h/x"}),
                await http.post("/v1/jobs", json={"prompt": "a fox", "lora": lora}),
                await http.post("/v1/jobs", headers={"Authorization": f"Bearer {CANARY}-wrong"}, json={}),
                await http.post("/generate-image", json={"prompt": "a fox", "lora_url": lora, "timeout": 1}),
            ]
        process.terminate()
        rest, _ = await asyncio.wait_for(process.communicate(), 40)
    all_of_it.said["the gateway's log"] = rest
    all_of_it.said["the gateway's answers"] = repr([(answer.headers, answer.text) for answer in answers]).encode()


async def test_no_secret_is_left_anywhere(everything: Everything, s3_at: S3Server, cli: Cli) -> None:
    """Each place has a word that must be found there, so that the search could find the canary too.

    Guards `consumer.logs.redact`, the events' redaction and the requests that are kept: without the first it is red.
    """
    expected = await submit_everything(everything)
    async with everything.consuming("the consumer's log"):
        assert await everything.ended(*expected) == expected
        await everything.run("listen", "--once", "--json")
        await everything.run("work", "--burst")
        fresh = f"{everything.stub.url}/loras/fox.safetensors?{SIGNED}"
        letters = await entries(everything.redis, KEYS.dead)
        [letter] = [entry_id.decode() for entry_id, fields in letters if fields.get(b"job_id") == b"late"]
        await asyncio.to_thread(look_with_every_command, everything, cli, letter)
        await everything.run("dead", "replay", letter, "--lora-url", fresh, "--json")
        await ask_a_gateway(everything)
        await everything.run("listen", "--once")
    everything.said["Redis"] = await everything_in_redis(everything.redis)
    url = everything.environment["DATABASE_URL"]
    everything.said["the database"] = await asyncio.to_thread(everything_in_the_database, url)
    everything.said["the bucket"] = await asyncio.to_thread(everything_in_the_bucket, s3_at)
    assert any(CANARY in seen.query for seen in everything.stub.seen)  # it has gone where it should
    assert [seen.query for seen in everything.stub.seen if seen.path.startswith("/hook")] != []
    markers = {
        "the consumer's log": b"drawing with http://127.0.0.1",
        "the gateway's log": b"/health",
        "the gateway's answers": b"INVALID_REQUEST",
        "Redis": b"/loras/fox.safetensors",
        "the database": b"/hook500",
        "the bucket": b"images/stored.png",
        "doctor": b"dead letters",
        "listen --once --json": b"generation.failed",
        "work --burst": b"webhook.postponed",
        "webhooks list": b"/hook",
        "dead list": b"crash",
    }
    for place, marker in markers.items():
        assert marker in everything.said[place], (place, everything.said[place][-2000:])
    leaks = {place: around(text) for place, text in everything.said.items() if CANARY.encode() in text.lower()}
    assert leaks == {}


def around(text: bytes) -> bytes:
    at = text.lower().find(CANARY.encode())
    return text[max(0, at - 300) : at + 100]


async def test_the_traceback_that_rq_keeps_of_a_failed_job_is_redacted(
    redis_at: RedisServer, keys: Keys, tmp_path: Path
) -> None:
    """Guards `WebhookWorker.handle_job_failure`."""
    queue = WebhookQueue(redis_at.url, keys.prefix)
    job = await asyncio.to_thread(queue.rq.enqueue, "builtins.int", f"https://h/object?{SIGNED}")
    environment = {"REDIS_URL": redis_at.url, "SDXL_PREFIX": keys.prefix, "WEBHOOK_SECRET": SECRET}
    environment["DATABASE_URL"] = f"sqlite:///{tmp_path / 'events.db'}"
    async with a_worker(environment, "--burst") as work:
        _, said = await work.until_ended()
    result = await asyncio.to_thread(job.latest_result)
    queue.close()
    assert result is not None
    for kept in (result.exc_string or "", said):
        assert "https://h/object" in kept
        assert CANARY not in kept
