"""What the listener keeps: every event once, and how each job stands.

SQLAlchemy Core over one engine. The calls block; whatever raises sqlalchemy.exc.SQLAlchemyError may be called again.
"""

import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Engine, Table, create_engine, make_url, select, tuple_
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection
from sqlalchemy.exc import ArgumentError
from sqlalchemy.schema import CreateIndex, CreateTable
from sqlalchemy.sql.base import ReadOnlyColumnCollection

from producer.completions import Completion
from producer.tables import EVENTS, IMAGES, JOBS, METADATA, event_row, image_row, job_row
from schemas.events import Event, SucceededEvent
from schemas.keys import JobState

_BUSY_TIMEOUT_MS = 10_000


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


class DatabaseRefused(ValueError):
    """The URL is of no database that the store can use. The text does not repeat it."""


class Store:
    """The tables in the database at `url` (an SQLAlchemy URL): SQLite or PostgreSQL.

    Nothing connects before the first call. Raises DatabaseRefused where the URL or its driver is of no use.
    """

    def __init__(self, url: str) -> None:
        self._engine = _engine(url)
        self._is_sqlite = self._engine.dialect.name == "sqlite"
        if self._is_sqlite:
            sqlalchemy_event.listen(self._engine, "connect", _set_up_sqlite)

    def create_tables(self) -> None:
        """Creates the tables that are missing, whoever else does at the same time."""
        with self._engine.begin() as connection:
            for table in METADATA.sorted_tables:
                connection.execute(CreateTable(table, if_not_exists=True))
                for index in table.indexes:
                    connection.execute(CreateIndex(index, if_not_exists=True))

    def close(self) -> None:
        """Closes the connections."""
        self._engine.dispose()

    def save(self, completions: Sequence[Completion]) -> list[bool]:
        """Stores a batch in one transaction; says of each completion whether its event was new.

        A job's row only moves forward: an older run, a late `started` or `retrying`, a duplicate change nothing.
        """
        if not completions:
            return []
        with self._engine.begin() as connection:
            unclaimed = self._insert_events(connection, completions)
            is_new = [_take(unclaimed, completion.event_id) for completion in completions]
            events = [one.event for one, new in zip(completions, is_new, strict=True) if new and one.event]
            self._move_jobs(connection, events)
            self._insert_images(connection, events)
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

    def _insert(self, table: Table) -> sqlite.Insert | postgresql.Insert:
        return sqlite.insert(table) if self._is_sqlite else postgresql.insert(table)


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() not in ("sqlite", "postgresql"):
            raise DatabaseRefused("neither SQLite nor PostgreSQL")
        return create_engine(parsed, hide_parameters=True, pool_pre_ping=True)
    except DatabaseRefused:
        raise
    except ImportError as error:
        raise DatabaseRefused(f"its driver is not installed: {error.name}") from None
    except (ArgumentError, ValueError, TypeError):
        raise DatabaseRefused("not the URL of a database") from None


def _set_up_sqlite(connection: Any, _record: object) -> None:
    connection.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
    with suppress(sqlite3.OperationalError):  # locked: whoever else opens the new file is switching it
        connection.execute("PRAGMA journal_mode = WAL")


def _progress(columns: ReadOnlyColumnCollection[str, Any]) -> ColumnElement[Any]:
    """How far a job has come, to be compared. A terminal event may carry a lower attempt than a `started` before it:
    a hand-back at shutdown uncounts."""
    return tuple_(columns["run"], columns["ended"], columns["attempt"], columns["state"] == JobState.DELAYED.value)


def _take(names: set[str], name: str) -> bool:
    if name not in names:
        return False
    names.remove(name)
    return True
