"""The database of the backend's side: opened by its URL, and brought to this version's tables."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError

from producer.tables import METADATA

VERSION_TABLE = "sdxl_alembic_version"  # not alembic's own name: the backend's migrations may be in the same database

_POSTGRESQL_DRIVER = "postgresql+psycopg"
_BUSY_TIMEOUT_MS = 10_000
_LOCK_KEY = int.from_bytes(b"sdxl", "big")
_ONE_AT_A_TIME = threading.Lock()  # alembic keeps what it works on in module globals


class DatabaseRefused(ValueError):
    """The database is none that this version can use. The text does not repeat its URL."""


def open_engine(url: str) -> Engine:
    """An engine for SQLite, or for PostgreSQL: by psycopg, unless `url` (an SQLAlchemy URL) names another driver.

    Nothing connects yet; who opens it disposes of it. Raises DatabaseRefused where the URL or its driver is of no use.
    """
    try:
        engine = create_engine(_checked(url), hide_parameters=True, pool_pre_ping=True)
    except DatabaseRefused:
        raise
    except ImportError as error:
        raise DatabaseRefused(f"its driver is not installed: {error.name}") from None
    except (ArgumentError, ValueError, TypeError):
        raise DatabaseRefused("not the URL of a database") from None
    if engine.dialect.is_async:
        raise DatabaseRefused(f"its driver is asynchronous: use {_POSTGRESQL_DRIVER} or sqlite")
    if is_sqlite(engine):
        event.listen(engine, "connect", _set_up_sqlite)
    return engine


def is_sqlite(engine: Engine) -> bool:
    """Whether it is SQLite; else it is PostgreSQL."""
    return engine.dialect.name == "sqlite"


def migrate(engine: Engine) -> None:
    """Brings the tables to this version, in one transaction, whoever else does at the same time.

    Raises DatabaseRefused where a newer version has been there, or a table of another program has one of our names;
    sqlalchemy.exc.SQLAlchemyError, and may then be called again.
    """
    config = Config()
    config.set_main_option("script_location", "producer:migrations")
    newest = ScriptDirectory.from_config(config)
    with _ONE_AT_A_TIME, _alone(engine) as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        heads = set(context.get_current_heads())
        if heads == set(newest.get_heads()):
            return
        if heads - {script.revision for script in newest.walk_revisions()}:
            raise DatabaseRefused("a newer version of this program has changed its tables")
        _check_names(connection)
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _checked(url: str) -> URL:
    parsed = make_url(url)
    if parsed.drivername in ("postgresql", "postgres"):
        return parsed.set(drivername=_POSTGRESQL_DRIVER)
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise DatabaseRefused("neither SQLite nor PostgreSQL")
    return parsed


def _set_up_sqlite(connection: Any, _record: object) -> None:
    connection.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
    with suppress(sqlite3.OperationalError):  # locked: whoever else opens the new file is switching it
        connection.execute("PRAGMA journal_mode = WAL")


@contextmanager
def _alone(engine: Engine) -> Iterator[Connection]:
    """A transaction that one process at a time can be in. It holds the migration's every statement, or none."""
    if not is_sqlite(engine):
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
            yield connection
        return
    # sqlite3 by itself begins no transaction before a CREATE TABLE
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        try:
            yield connection
        except BaseException:
            connection.exec_driver_sql("ROLLBACK")
            raise
        connection.exec_driver_sql("COMMIT")


def _check_names(connection: Connection) -> None:
    inspector = inspect(connection)
    for name in set(inspector.get_table_names()) & set(METADATA.tables):
        if {column["name"] for column in inspector.get_columns(name)} - set(METADATA.tables[name].columns.keys()):
            raise DatabaseRefused(f"its table {name} is another program's: give this one a schema of its own")
