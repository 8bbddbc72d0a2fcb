"""Which databases are taken; that nothing is touched before it is needed; that a wheel brings the migrations."""

import logging
from importlib import resources
from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

from producer.database import DatabaseRefused, migrate, open_engine
from producer.store import Store

CANARY = "c0ffee5ec2e7"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (f"mysql://u:{CANARY}@host/x", "neither SQLite nor PostgreSQL"),
        (f"mysql+nosuch://u:{CANARY}@host/x", "neither SQLite nor PostgreSQL"),
        (f"{CANARY}://host/x", "neither SQLite nor PostgreSQL"),
        (f"postgresql+{CANARY}://host/x", "not the URL of a database"),
        (f"postgresql://host:{CANARY}/x", "not the URL of a database"),
        (f"sqlite:///x.db?timeout={CANARY}", "not the URL of a database"),
        (f"sqlite:///x.db?timeout={CANARY}&timeout=2", "not the URL of a database"),
        (CANARY, "not the URL of a database"),
        ("postgresql+pg8000://host/x", "its driver is not installed: pg8000"),
        (
            f"postgresql+psycopg_async://u:{CANARY}@host/x",
            "its driver is asynchronous: use postgresql+psycopg or sqlite",
        ),
    ],
)
def test_a_database_that_cannot_serve_is_refused_before_anything_is_stored(url: str, said: str) -> None:
    with pytest.raises(DatabaseRefused) as caught:
        open_engine(url)
    assert str(caught.value) == said


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_postgresql_is_spoken_by_psycopg_however_a_platform_writes_its_url(scheme: str) -> None:
    engine = open_engine(f"{scheme}://u:{CANARY}@host/x?sslmode=require")
    assert engine.dialect.driver == "psycopg"
    assert engine.url.query == {"sslmode": "require"}
    assert CANARY not in f"{engine!r}"


def test_opening_and_saving_nothing_touch_no_database(tmp_path: Path) -> None:
    assert Store(open_engine(f"sqlite:///{tmp_path}/missing/store.db")).save([]) == []


def test_a_migration_leaves_the_logging_of_the_program_as_it_is(tmp_path: Path) -> None:
    root, before = logging.getLogger(), logging.getLogger("before")
    handlers, level = list(root.handlers), root.level
    engine = open_engine(f"sqlite:///{tmp_path}/store.db")
    migrate(engine)
    engine.dispose()
    assert (root.handlers, root.level, before.disabled) == (handlers, level, False)


def test_the_migrations_are_files_of_the_package_in_one_line_from_the_first_to_the_newest() -> None:
    files = [item.name for item in resources.files("producer").joinpath("migrations/versions").iterdir()]
    config = Config()
    config.set_main_option("script_location", "producer:migrations")
    scripts = list(ScriptDirectory.from_config(config).walk_revisions())
    assert sorted(Path(script.path).name for script in scripts) == sorted(name for name in files if name.endswith("py"))
    assert [script.down_revision for script in scripts] == [*(script.revision for script in scripts[1:]), None]
