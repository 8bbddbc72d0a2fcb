"""How many events a second one listener stores: `python -m benchmarks.listener`.

A real Redis (without persistence), SQLite and PostgreSQL (both as durable as they are by default), all on this machine.
An event counts when it is stored, acknowledged, and its webhook is in the queue.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import structlog
from redis.asyncio import Redis

from demo.servers import redis_server
from producer.cli.output import stdout, table
from producer.database import open_engine
from producer.listener import from_settings
from producer.settings import ProducerSettings
from schemas.events import Event
from schemas.keys import Keys
from schemas.requests import GenerationRequest
from tests import event_kit
from tests.postgres import postgres_server

RESULTS = Path(__file__).parent / "results" / "listener.json"
LIBRARIES = ("redis", "sqlalchemy", "psycopg", "pydantic", "rq")
HOOK = "https://backend.example/hooks/pictures"
MIX = "per 100 jobs: 100 started, 5 retrying and 5 started again, 92 succeeded, 8 failed; a webhook on every other job"


@dataclass(frozen=True)
class Result:
    """`rates` are events per second, one for each run."""

    database: str
    version: str
    events: int
    webhooks: int
    rates: list[int]

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


def life(number: int) -> Iterator[Event]:
    """What one job publishes."""
    job_id, attempt = f"{number:08x}-bench", 1
    yield event_kit.started(job_id)
    if number % 20 == 0:
        yield event_kit.retrying(job_id, error="the LoRA's host answered 503")
        attempt = 2
        yield event_kit.started(job_id, attempt=attempt)
    if number % 25 in (3, 17):
        yield event_kit.failed(job_id, attempt=attempt, error="the attempt ran past its 60 s")
    else:
        yield event_kit.succeeded(job_id, attempt=attempt)


async def publish(redis: Redis, keys: Keys, count: int) -> tuple[int, int]:
    """Fills the stream as consumers would; returns how many jobs there are, and how many of them have a webhook."""
    published = job = 0
    pipe = redis.pipeline(transaction=False)
    while published < count:
        request = GenerationRequest(
            job_id=f"{job:08x}-bench",
            prompt="a portrait of ann, soft light, 85 mm, film grain",
            lora_key="loras/ann.safetensors",
            webhook_url=HOOK if job % 2 else None,
        )
        pipe.hset(keys.job(request.job_id), "payload", request.encode().decode())
        for event in life(job):
            pipe.xadd(keys.completions, {"type": event.type, "job_id": request.job_id, "payload": event.encode()})
            published += 1
        job += 1
        if job % 500 == 0:
            await pipe.execute()
    await pipe.execute()
    return published, job // 2


async def measure(redis_url: str, database_url: str, count: int) -> tuple[int, int, float]:
    """How many events, how many webhooks, and the seconds that one listener needed for them."""
    keys = Keys(f"bench-{time.monotonic_ns()}")
    redis = Redis.from_url(redis_url)
    events, webhooks = await publish(redis, keys, count)
    settings = ProducerSettings(REDIS_URL=redis_url, SDXL_PREFIX=keys.prefix, DATABASE_URL=database_url)
    async with from_settings(settings) as listener:
        await asyncio.to_thread(listener.store.migrate)
        began = time.perf_counter()
        stored = await listener.catch_up()
        took_s = time.perf_counter() - began
    await redis.flushdb()
    await redis.aclose()
    if stored != events:
        raise RuntimeError(f"{events} events were published, {stored} were stored")
    return events, webhooks, took_s


def version_of(database_url: str) -> str:
    engine = open_engine(database_url)
    with engine.connect() as connection:
        query = "SELECT sqlite_version()" if engine.dialect.name == "sqlite" else "SHOW server_version"
        version = str(connection.exec_driver_sql(query).scalar())
    engine.dispose()
    return version.split()[0]


def benchmark(count: int, runs: int) -> Iterator[Result]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="listener-")))
        redis = stack.enter_context(redis_server(folder))
        postgres = stack.enter_context(postgres_server(settings={}))
        databases = {
            "SQLite": [f"sqlite:///{folder}/{run}.db" for run in range(runs)],
            "PostgreSQL": [postgres.create_database() for _ in range(runs)],
        }
        for database, urls in databases.items():
            measured = [asyncio.run(measure(redis.url, url, count)) for url in urls]
            [(events, webhooks)] = {(events, webhooks) for events, webhooks, _ in measured}
            rates = [round(events / took_s) for *_, took_s in measured]
            yield Result(database, version_of(urls[0]), events, webhooks, rates)


def hardware() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.system()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("warning"))
    results = list(benchmark(arguments.events, arguments.runs))
    rows = [
        (one.database, one.version, one.events, one.webhooks, round(one.median), f"{min(one.rates)}..{max(one.rates)}")
        for one in results
    ]
    stdout().print(table(("database", "version", "events", "webhooks", "events/s (median)", "spread"), rows))
    document = {
        "command": f"python -m benchmarks.listener --events {arguments.events} --runs {arguments.runs}",
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "mix": MIX,
        "hardware": hardware(),
        "versions": {"python": sys.version.split()[0], **{name: metadata.version(name) for name in LIBRARIES}},
        "results": [{**asdict(one), "median": one.median} for one in results],
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
