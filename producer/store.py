"""What the listener keeps: every event once, and how each job stands.

SQLAlchemy Core over one engine. The calls block; whatever raises sqlalchemy.exc.SQLAlchemyError may be called again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Engine, select, tuple_
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection
from sqlalchemy.sql.base import ReadOnlyColumnCollection

from producer.completions import Completion
from producer.database import is_sqlite, migrate
from producer.tables import DELIVERIES, EVENTS, IMAGES, JOBS, delivery_row, event_row, image_row, job_row
from schemas.events import Event, SucceededEvent
from schemas.keys import JobState


@dataclass(frozen=True, slots=True)
class StoredJob:
    """A row of `jobs`: what the furthest event of the newest run says.

    `retry_after` is in seconds: until the consumers' own retry while `delayed`, else as the failed event has it.
    """

    job_id: str
    run: int
    state: JobState
    ended: bool
    attempt: int
    error_code: str | None
    error: str | None
    retry_after: float | None
    image_url: str | None
    image_key: str | None
    request_metadata: dict[str, Any]
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class StoredImage:
    """A row of `images`: one picture. `timings` and `gpu_seconds` are in seconds, `width` and `height` in pixels."""

    job_id: str
    run: int
    url: str | None
    key: str | None
    sha256: str
    bytes: int
    width: int
    height: int
    seed: int
    steps: int
    cfg: float
    timings: dict[str, float]
    model_info: dict[str, Any]
    gpu: str
    gpu_seconds: float


class Store:
    """The tables in an engine's database. Nothing connects before the first call."""

    def __init__(self, engine: Engine, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._engine = engine
        self._now = now
        self._insert = sqlite.insert if is_sqlite(engine) else postgresql.insert

    def migrate(self) -> None:
        """Brings the tables to this version. Raises DatabaseRefused as `producer.database.migrate` does."""
        migrate(self._engine)

    def save(self, completions: Sequence[Completion], webhook_urls: Mapping[str, str] | None = None) -> list[bool]:
        """Stores a batch in one transaction; says of each completion whether its event was new.

        A job's row only moves forward: an older run, a late `started` or `retrying`, a duplicate change nothing.
        `webhook_urls` says by event id where a new event is to be delivered; that becomes a pending delivery, due now.
        """
        if not completions:
            return []
        with self._engine.begin() as connection:
            unclaimed = self._insert_events(connection, completions)
            is_new = [_take(unclaimed, completion.event_id) for completion in completions]
            events = [one.event for one, new in zip(completions, is_new, strict=True) if new and one.event]
            self._move_jobs(connection, events)
            self._insert_images(connection, events)
            self._insert_deliveries(connection, events, webhook_urls or {})
        return is_new

    def job(self, job_id: str) -> StoredJob | None:
        """How a job stands, None if no event of it was stored."""
        with self._engine.connect() as connection:
            row = connection.execute(select(JOBS).where(JOBS.c.job_id == job_id)).mappings().first()
        return StoredJob(**{**row, "state": JobState(row["state"])}) if row else None

    def image(self, job_id: str) -> StoredImage | None:
        """The picture of a job's newest run that has one."""
        query = select(IMAGES).where(IMAGES.c.job_id == job_id).order_by(IMAGES.c.run.desc()).limit(1)
        with self._engine.connect() as connection:
            row = connection.execute(query).mappings().first()
        return StoredImage(**row) if row else None

    def _insert_events(self, connection: Connection, completions: Sequence[Completion]) -> set[str]:
        # In the order of the key, here and below, so that two listeners cannot wait for each other.
        rows = sorted(map(event_row, completions), key=lambda row: str(row["event_id"]))
        insert = self._insert(EVENTS).on_conflict_do_nothing(index_elements=["event_id"])
        return set(connection.scalars(insert.returning(EVENTS.c.event_id), rows))

    def _move_jobs(self, connection: Connection, events: Sequence[Event]) -> None:
        rows = sorted(map(job_row, events), key=lambda row: str(row["job_id"]))
        insert = self._insert(JOBS)
        values = {column.name: insert.excluded[column.name] for column in JOBS.c if not column.primary_key}
        move = insert.on_conflict_do_update(
            index_elements=["job_id"], set_=values, where=_progress(JOBS.c) < _progress(insert.excluded)
        )
        if rows:
            connection.execute(move, rows)

    def _insert_images(self, connection: Connection, events: Sequence[Event]) -> None:
        rows = [image_row(event) for event in events if isinstance(event, SucceededEvent)]
        insert = self._insert(IMAGES).on_conflict_do_nothing(index_elements=["job_id", "run"])
        if rows:
            connection.execute(insert, sorted(rows, key=lambda row: str(row["job_id"])))

    def _insert_deliveries(self, connection: Connection, events: Sequence[Event], urls: Mapping[str, str]) -> None:
        now = self._now()
        rows = [delivery_row(event, urls[event.id], now) for event in events if event.id in urls]
        insert = self._insert(DELIVERIES).on_conflict_do_nothing(index_elements=["event_id"])
        if rows:
            connection.execute(insert, sorted(rows, key=lambda row: str(row["event_id"])))


def _progress(columns: ReadOnlyColumnCollection[str, Any]) -> ColumnElement[Any]:
    """How far a job has come, to be compared. A terminal event may carry a lower attempt than a `started` before it:
    a hand-back at shutdown uncounts."""
    return tuple_(columns["run"], columns["ended"], columns["attempt"], columns["state"] == JobState.DELAYED.value)


def _take(names: set[str], name: str) -> bool:
    if name not in names:
        return False
    names.remove(name)
    return True
