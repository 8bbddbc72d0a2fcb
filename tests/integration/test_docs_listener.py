"""What the page on the listener shows is so: its handlers, its statements, its tables."""

import asyncio
import re
from datetime import timedelta
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from redis.asyncio import Redis
from sqlalchemy import Engine, text

from demo.servers import RedisServer
from producer.database import migrate, open_engine
from producer.store import Store
from producer.tables import METADATA
from schemas.events import Event
from schemas.keys import Keys
from tests.docs_kit import DOCS, blocks_of
from tests.event_kit import failed, started, succeeded
from tests.integration.listener_kit import PATIENCE_S, publish, until_acknowledged
from tests.integration.store_kit import execute, rows, save

PAGE = (DOCS / "listener.md").read_text()
HOOK = "https://backend.example/hook"
[PRUNE] = re.findall(r"^```sql\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


async def test_the_handlers_run_and_write_once_what_comes_twice(
    redis_at: RedisServer,
    redis: Redis,
    keys: Keys,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    environment = {"REDIS_URL": redis_at.url, "SDXL_PREFIX": keys.prefix, "DATABASE_URL": "sqlite:///events.db"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    names: dict[str, Any] = {}
    for block in blocks_of(DOCS / "listener.md"):
        FunctionType(block.compiled(), names)()
    execute(names["backend"], "CREATE TABLE pictures (event_id TEXT PRIMARY KEY, url TEXT)")
    await publish(redis, keys, started(), succeeded(), succeeded(), failed("job-2"))
    stop = asyncio.Event()
    listening = asyncio.create_task(names["listen"](stop))
    await asyncio.sleep(0)
    await until_listened(redis, keys)
    stop.set()
    await asyncio.wait_for(listening, PATIENCE_S)
    with names["backend"].connect() as connection:
        kept = connection.execute(text("SELECT * FROM pictures")).all()
    names["backend"].dispose()
    assert kept == [("job-1:1:succeeded", "https://images.example/images/job-1.png")]
    assert "job-2 GENERATION_FAILED 30\n" in capsys.readouterr().out


async def until_listened(redis: Redis, keys: Keys) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await redis.xinfo_groups(keys.completions):
            await asyncio.sleep(0.01)
    await until_acknowledged(redis, keys)


def test_pruning_takes_what_is_old_and_never_what_is_still_to_be_delivered(store: Store, engine: Engine) -> None:
    later = timedelta(days=365)
    old: list[Event] = [started("old"), failed("old"), succeeded("pending"), started("pending")]
    young = [event.model_copy(update={"timestamp": event.timestamp + later}) for event in (started("y"), failed("y"))]
    save(store, *old, *young, webhook_urls={event.id: HOOK for event in (old[1], old[2], young[1])})
    execute(engine, "UPDATE deliveries SET state = 'delivered' WHERE job_id <> 'pending'")
    execute(engine, "UPDATE deliveries SET created_at = '2026-01-02 00:00:00' WHERE job_id <> 'y'")
    for statement in PRUNE.replace("2026-01-01", "2026-06-01").split(";"):
        if statement.strip():
            execute(engine, statement)
    assert [row["event_id"] for row in rows(engine, "deliveries")] == ["pending:1:succeeded", "y:1:failed"]
    kept = [row["event_id"] for row in rows(engine, "events")]
    assert kept == ["pending:1:succeeded", "y:1:failed", "y:1:started:1"]
    assert len(rows(engine, "jobs")) == 3


def test_every_column_is_on_the_page() -> None:
    section = PAGE.partition("## The tables")[2].partition("\n## ")[0]
    parts = dict(re.findall(r"^\*\*`(\w+)`\*\*(.*?)(?=^\*\*`|\Z)", section, re.DOTALL | re.MULTILINE))
    assert set(parts) == set(METADATA.tables)
    for name, described in parts.items():
        missing = {column.name for column in METADATA.tables[name].columns} - set(re.findall(r"`(\w+)`", described))
        assert not missing, name


def test_a_schema_of_its_own_keeps_out_of_the_way_of_the_backends_tables(postgres_url: str) -> None:
    backend = open_engine(postgres_url)
    execute(backend, "CREATE TABLE jobs (id INTEGER PRIMARY KEY, salary INTEGER)")
    execute(backend, "CREATE SCHEMA sdxl")
    [option] = re.findall(r"\?(options=[^']*)'", PAGE)
    ours = open_engine(f"{postgres_url}&{option}")
    migrate(ours)
    assert save(Store(ours), failed()) == [True]
    with backend.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM sdxl.jobs")).scalar() == 1
        assert connection.execute(text("SELECT count(*) FROM public.jobs")).scalar() == 0
    ours.dispose()
    backend.dispose()
