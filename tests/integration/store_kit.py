"""A look at the listener's tables."""

from typing import Any

from sqlalchemy import Engine, select

from producer.store import Store
from producer.tables import METADATA
from schemas.events import Event
from tests.event_kit import completion


def save(store: Store, *events: Event, **options: Any) -> list[bool]:
    return store.save([completion(event) for event in events], **options)


def rows(engine: Engine, table: str) -> list[dict[str, Any]]:
    """The table as it is, in the order of its key."""
    query = select(METADATA.tables[table]).order_by(*METADATA.tables[table].primary_key)
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


def everything(engine: Engine) -> dict[str, list[dict[str, Any]]]:
    return {table: rows(engine, table) for table in METADATA.tables}


def execute(engine: Engine, statement: str) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(statement)
