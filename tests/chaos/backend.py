"""The backend's processes in a world: a listener, webhook workers, commands; what they store is checked."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from redis.exceptions import ResponseError
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from producer.database import open_engine
from producer.webhooks.receiver import verify
from tests.chaos.world import BUCKET, TERMINAL, Consumer, World
from tests.integration.store_kit import everything
from tests.integration.webhook_kit import SECRET
from tests.s3_stub import ACCESS_KEY, SECRET_KEY, Seen

_CANARY = "X-Amz-Signature=canary"
_WITNESS = "witness"


class Received(NamedTuple):
    """A webhook as it came in, verified."""

    event_id: str
    body: bytes


class Backend:
    """Uses one database. Its processes speak to Redis through the world's proxy, and are stopped with the world's."""

    def __init__(self, world: World, database_url: str) -> None:
        self.world = world
        self.database_url = database_url
        self.engine: Engine = open_engine(database_url)
        with suppress(ResponseError):  # another backend of this world has made it
            # a group that reads nothing: the stream stays whole, to be compared with the rows
            world.redis.xgroup_create(world.keys.completions, _WITNESS, id="0", mkstream=True)

    # --- its processes ---

    def listen(self, *options: str, **environment: str) -> Consumer:
        return self._start("listen", "--json", *options, **environment)

    def work(self, **environment: str) -> Consumer:
        return self._start("work", **environment)

    def replay(self, *options: str) -> Consumer:
        return self._start("dead", "replay", "--all", "--json", *options)

    def command(self, *arguments: str) -> Consumer:
        return self._start(*arguments)

    def kill_tree(self, process: Consumer) -> None:
        """kill -9 of a process and of those that it has forked."""
        _kill_children(process.process.pid)
        process.kill()

    def hook(self, path: str) -> str:
        """The URL of a receiver on the world's HTTP server, with something in it that nobody may keep."""
        return f"{self.world.store.url}{path}?{_CANARY}"

    def _start(self, *arguments: str, **environment: str) -> Consumer:
        settings = {
            "REDIS_URL": f"redis://127.0.0.1:{self.world.proxy.port}/0",
            "DATABASE_URL": self.database_url,
            "WEBHOOK_SECRET": SECRET,
            "WEBHOOK_ALLOWED_HOSTS": "127.0.0.1",
            "LORA_ALLOW_LOOPBACK": "true",
            "R2_ACCESS_KEY_ID": ACCESS_KEY,
            "R2_SECRET_ACCESS_KEY": SECRET_KEY,
            "R2_BUCKET_NAME": BUCKET,
            "R2_ENDPOINT_URL": self.world.store.url,
            **environment,
        }
        log = self.world.folder / f"{arguments[0]}-{len(self.world.consumers)}.log"
        with log.open("wb") as output:
            command = [sys.executable, "-m", "producer", *arguments]
            process = subprocess.Popen(command, env={**os.environ, **settings}, stdout=output, stderr=output)
        self.world.consumers.append(Consumer(process, log))
        return self.world.consumers[-1]

    # --- what it has ---

    def rows(self, table: str) -> list[dict[str, Any]]:
        """The table as it is; nothing while there is no database."""
        try:
            return everything(self.engine)[table]
        except SQLAlchemyError:
            return []

    def has_every_event(self) -> bool:
        """Whether each event of the stream is in the table, and acknowledged."""
        stored = {row["event_id"] for row in self.rows("events")}
        groups: Any = self.world.redis.xinfo_groups(self.world.keys.completions)
        pending = [group["pending"] for group in groups if group["name"] != _WITNESS.encode()]
        # no group: the listener is not there yet
        return pending == [0] and stored >= {event["id"] for event in self.world.events()}

    def delivery(self, job_id: str) -> dict[str, Any]:
        """The row of a job's delivery; an empty one while there is none."""
        return next((row for row in self.rows("deliveries") if row["job_id"] == job_id), {})

    def delivered(self, *job_ids: str) -> bool:
        states = {row["job_id"]: row["state"] for row in self.rows("deliveries")}
        return all(states.get(job_id) == "delivered" for job_id in job_ids)

    def received(self, path: str) -> list[Received]:
        """What has arrived there, whatever it was answered."""
        hooks: list[Seen] = [seen for seen in list(self.world.store.seen) if seen.path == path]
        return [Received(verify(seen.body, seen.headers, SECRET).id, seen.body) for seen in hooks]

    def verify(self) -> None:
        """The listener's invariants, once everything is stored: each event once, each end told, nothing secret kept."""
        events = {event["id"]: event for event in self.world.events()}
        found = everything(self.engine)
        assert sorted(row["event_id"] for row in found["events"]) == sorted(events)
        ends = {event["data"]["job_id"]: event for event in events.values() if event["type"] in TERMINAL}
        assert {row["job_id"]: (row["state"], row["run"]) for row in found["jobs"]} == {
            job_id: (event["type"].removeprefix("generation."), event["data"]["run"]) for job_id, event in ends.items()
        }
        kept = json.dumps(found, default=str) + "".join(one.log.read_text() for one in self.world.consumers)
        for secret in ("X-Amz-Signature", SECRET, SECRET_KEY):
            assert secret not in kept

    def until(self, condition: Callable[[], object], within_s: float = 90.0) -> None:
        self.world.until(condition, within_s)

    def close(self) -> None:
        """Ends what it has started and the world does not know: RQ's own processes."""
        for one in self.world.consumers:
            _kill_children(one.process.pid)
        self.engine.dispose()


def _kill_children(pid: int) -> None:
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()


@contextmanager
def a_backend(world: World, database_url: str | None = None) -> Iterator[Backend]:
    """Without a URL it uses SQLite, in the world's folder."""
    backend = Backend(world, database_url or sqlite_url(world.folder))
    try:
        yield backend
    finally:
        backend.close()


def sqlite_url(folder: Path, name: str = "backend") -> str:
    return f"sqlite:///{folder}/{name}.db"
