"""The tables from version to version, on both databases: equal to METADATA, no row lost, several processes at once."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, inspect
from sqlalchemy.exc import OperationalError
from sqlalchemy.schema import CreateIndex, CreateTable

from producer.database import VERSION_TABLE, DatabaseRefused, migrate, open_engine
from producer.store import Store
from producer.tables import METADATA
from tests.event_kit import failed, succeeded
from tests.integration.store_kit import everything, execute, rows, save

FIRST_TABLES = ("jobs", "events", "images")


def create_as_before_there_were_migrations(engine: Engine) -> None:
    with engine.begin() as connection:
        for name in FIRST_TABLES:
            connection.execute(CreateTable(METADATA.tables[name], if_not_exists=True))
            for index in METADATA.tables[name].indexes:
                connection.execute(CreateIndex(index, if_not_exists=True))


def version(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return [str(number) for number in connection.exec_driver_sql("SELECT * FROM sdxl_alembic_version").scalars()]


def test_migrated_tables_are_those_that_the_code_works_with(engine: Engine) -> None:
    migrate(engine)
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": VERSION_TABLE, "compare_type": True, "compare_server_default": True}
        )
        assert compare_metadata(context, METADATA) == []


def test_migrating_again_changes_nothing(engine: Engine) -> None:
    migrate(engine)
    before = version(engine)
    save(Store(engine), failed())
    migrate(engine)
    assert version(engine) == before
    assert len(rows(engine, "jobs")) == 1


def test_a_database_from_before_there_were_migrations_keeps_its_rows(engine: Engine) -> None:
    create_as_before_there_were_migrations(engine)
    execute(
        engine,
        "INSERT INTO jobs VALUES ('old', 1, 'failed', true, 1, 'TIMEOUT', 'late', 0, NULL, NULL, '{}', "
        "'2026-01-02 03:04:05')",
    )
    before = rows(engine, "jobs")
    migrate(engine)
    assert rows(engine, "jobs") == before
    store = Store(engine)
    urls = {succeeded().id: "https://backend.example/hook"}
    assert save(store, failed("old", run=2), succeeded(), webhook_urls=urls) == [True, True]
    assert [row["run"] for row in rows(engine, "jobs")] == [1, 2]
    assert len(rows(engine, "deliveries")) == 1


def test_a_database_that_a_newer_version_has_migrated_is_refused_and_left_alone(engine: Engine) -> None:
    migrate(engine)
    execute(engine, "UPDATE sdxl_alembic_version SET version_num = '9999'")
    with pytest.raises(DatabaseRefused, match="a newer version of this program has changed its tables"):
        migrate(engine)
    assert version(engine) == ["9999"]


def test_a_table_of_another_program_is_not_taken_for_ours(engine: Engine) -> None:
    execute(engine, "CREATE TABLE jobs (id INTEGER PRIMARY KEY, salary INTEGER)")
    with pytest.raises(DatabaseRefused, match="its table jobs is another program's"):
        migrate(engine)
    assert inspect(engine).get_table_names() == ["jobs"]


def test_the_backends_own_migrations_may_live_beside_ours(engine: Engine) -> None:
    execute(engine, "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
    execute(engine, "INSERT INTO alembic_version VALUES ('theirs')")
    execute(engine, "CREATE TABLE invoices (id INTEGER PRIMARY KEY)")
    migrate(engine)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT * FROM alembic_version").scalars().all() == ["theirs"]
    assert "invoices" in inspect(engine).get_table_names()


def test_a_migration_that_fails_leaves_nothing_behind_and_may_be_tried_again(engine: Engine) -> None:
    # A view has the name of a table that the second migration makes.
    execute(engine, "CREATE VIEW deliveries AS SELECT 1 AS one")
    with pytest.raises(Exception, match="deliveries"):
        migrate(engine)
    assert inspect(engine).get_table_names() == []
    execute(engine, "DROP VIEW deliveries")
    migrate(engine)
    assert set(everything(engine)) == set(METADATA.tables)


def _migrate_at(database_url: str) -> None:
    engine = open_engine(database_url)
    migrate(engine)
    engine.dispose()


@pytest.mark.parametrize("pool", ["threads", "processes"])
def test_several_may_migrate_an_empty_database_at_once(database_url: str, pool: str) -> None:
    with (
        ThreadPoolExecutor(8)
        if pool == "threads"
        else ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"))
    ) as executor:
        list(executor.map(_migrate_at, [database_url] * 8))
    engine = open_engine(database_url)
    assert len(version(engine)) == 1
    assert not any(everything(engine).values())
    engine.dispose()


def test_a_process_may_migrate_several_databases_at_once(tmp_path: Path) -> None:
    urls = [f"sqlite:///{tmp_path}/{number}.db" for number in range(16)]
    with ThreadPoolExecutor(8) as executor:
        list(executor.map(_migrate_at, urls))
    for url in urls:
        engine = open_engine(url)
        assert len(version(engine)) == 1
        assert not any(everything(engine).values())
        engine.dispose()


def test_a_database_out_of_reach_is_an_error_that_may_pass(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{tmp_path}/missing/store.db")
    with pytest.raises(OperationalError):
        migrate(engine)
    engine.dispose()
