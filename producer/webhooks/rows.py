"""The rows of `deliveries` and `disabled_endpoints`: what is to be sent, what became of it, who wants no more."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, CursorResult, Engine, Select, delete, select, update
from sqlalchemy.dialects import postgresql, sqlite

from producer.database import is_sqlite
from producer.tables import DELIVERIES, DISABLED, DISABLED_ENDPOINTS, EVENTS, GAVE_UP, PENDING
from schemas.net.http import utc_now

_BATCH = 500  # ids in one statement


@dataclass(frozen=True, slots=True)
class Delivery:
    """A row of `deliveries`.

    `attempts` counts those that have begun since it was last due at once. `status` is the HTTP status of the last one,
    if it was answered, and `error` says why it was no success. `due_at` counts while `state` is pending.
    """

    event_id: str
    job_id: str
    url: str
    state: str
    attempts: int
    due_at: datetime
    status: int | None
    error: str | None
    created_at: datetime
    ended_at: datetime | None


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A delivery with what its next attempt needs to know. `body` None: the event is no longer kept."""

    delivery: Delivery
    body: bytes | None
    is_disabled: bool


@dataclass(frozen=True, slots=True)
class DisabledEndpoint:
    """A row of `disabled_endpoints`: nothing is sent to `url` (without its query)."""

    url: str
    reason: str
    disabled_at: datetime


class Deliveries:
    """The rows in an engine's database. The calls block, and raise sqlalchemy.exc.SQLAlchemyError."""

    def __init__(self, engine: Engine, *, now: Callable[[], datetime] = utc_now) -> None:
        self._engine = engine
        self._now = now
        self._insert = sqlite.insert if is_sqlite(engine) else postgresql.insert

    def load(self, event_id: str) -> Outgoing | None:
        """One delivery, with its body."""
        columns = (*DELIVERIES.c, EVENTS.c.payload, DISABLED_ENDPOINTS.c.disabled_at)
        query = (
            select(*columns)
            .outerjoin_from(DELIVERIES, EVENTS, EVENTS.c.event_id == DELIVERIES.c.event_id)
            .outerjoin(DISABLED_ENDPOINTS, DISABLED_ENDPOINTS.c.url == DELIVERIES.c.url)
            .where(DELIVERIES.c.event_id == event_id)
        )
        with self._engine.connect() as connection:
            row = connection.execute(query).first()
        if row is None:
            return None
        *values, payload, disabled_at = row
        return Outgoing(Delivery(*values), None if payload is None else payload.encode(), disabled_at is not None)

    def begin(self, delivery: Delivery, delay_s: float) -> bool:
        """Counts an attempt before it is made, due again in `delay_s` seconds should nothing be heard of it any more.

        False where somebody else has begun one meanwhile, or has ended it.
        """
        with self._engine.begin() as connection:
            begun = connection.execute(
                _pending(delivery.event_id)
                .where(DELIVERIES.c.attempts == delivery.attempts)
                .values(attempts=delivery.attempts + 1, due_at=self._now() + timedelta(seconds=delay_s))
            )
        return _count(begun) == 1

    def postpone(self, event_id: str, attempt: int, delay_s: float, status: int | None, error: str) -> None:
        """A failed attempt: the next one is due in `delay_s` seconds, unless somebody has revived the row meanwhile."""
        with self._engine.begin() as connection:
            due_at = self._now() + timedelta(seconds=delay_s)
            these = _pending(event_id).where(DELIVERIES.c.attempts == attempt)
            connection.execute(these.values(due_at=due_at, status=status, error=error))

    def end(self, event_id: str, state: str, status: int | None, error: str | None) -> None:
        """No further attempt: `state` is delivered or disabled."""
        with self._engine.begin() as connection:
            self._end(connection, event_id, state, status, error)

    def give_up(self, event_id: str, attempts: int, status: int | None, error: str | None) -> None:
        """No further attempt after so many, unless somebody has revived the row meanwhile."""
        values = {"state": GAVE_UP, "status": status, "error": error, "ended_at": self._now()}
        with self._engine.begin() as connection:
            connection.execute(_pending(event_id).where(DELIVERIES.c.attempts == attempts).values(values))

    def end_with_endpoint(self, delivery: Delivery, status: int, reason: str) -> None:
        """The endpoint wants no more: it is disabled, and this delivery ends so."""
        with self._engine.begin() as connection:
            self._disable(connection, delivery.url, reason)
            self._end(connection, delivery.event_id, DISABLED, status, reason)

    def get(self, event_id: str) -> Delivery | None:
        """One delivery."""
        found = self._select(select(DELIVERIES).where(DELIVERIES.c.event_id == event_id))
        return found[0] if found else None

    def find(
        self, *, state: str | None = None, job_id: str | None = None, url: str | None = None, limit: int | None = None
    ) -> list[Delivery]:
        """The deliveries that match all that is given, the newest first."""
        query = select(DELIVERIES).order_by(DELIVERIES.c.created_at.desc(), DELIVERIES.c.event_id).limit(limit)
        for column, wanted in ((DELIVERIES.c.state, state), (DELIVERIES.c.job_id, job_id), (DELIVERIES.c.url, url)):
            if wanted is not None:
                query = query.where(column == wanted)
        return self._select(query)

    def among(self, event_ids: Sequence[str]) -> list[Delivery]:
        """Those of these deliveries that there are."""
        return [
            delivery
            for batch in _batches(event_ids)
            for delivery in self._select(select(DELIVERIES).where(DELIVERIES.c.event_id.in_(batch)))
        ]

    def overdue(self, grace_s: float, limit: int) -> list[str]:
        """Event ids of what should have been tried `grace_s` seconds ago, the oldest first."""
        before = self._now() - timedelta(seconds=grace_s)
        columns = DELIVERIES.c
        query = select(columns.event_id).where(columns.state == PENDING, columns.due_at < before)
        with self._engine.connect() as connection:
            return list(connection.scalars(query.order_by(columns.due_at).limit(limit)))

    def revive(self, event_ids: Sequence[str]) -> list[str]:
        """Makes deliveries pending again, due now, with all their attempts before them; whatever state they are in.

        Returns their ids. Those that do not exist, or whose endpoint is disabled, stay as they are.
        """
        values: dict[str, Any] = {"state": PENDING, "attempts": 0, "due_at": self._now()}
        values |= dict.fromkeys(("status", "error", "ended_at"))
        disabled = select(DISABLED_ENDPOINTS.c.url)
        statement = update(DELIVERIES).where(DELIVERIES.c.url.not_in(disabled)).values(values)
        revived: list[str] = []
        for batch in _batches(event_ids):
            these = statement.where(DELIVERIES.c.event_id.in_(batch)).returning(DELIVERIES.c.event_id)
            with self._engine.begin() as connection:
                revived += connection.scalars(these)
        return revived

    def disable(self, url: str, reason: str) -> None:
        """From now on nothing is sent to `url`."""
        with self._engine.begin() as connection:
            self._disable(connection, url, reason)

    def enable(self, url: str) -> bool:
        """Lets `url` have its webhooks again; whether it was disabled."""
        with self._engine.begin() as connection:
            gone = connection.execute(delete(DISABLED_ENDPOINTS).where(DISABLED_ENDPOINTS.c.url == url))
        return _count(gone) == 1

    def disabled_endpoints(self) -> list[DisabledEndpoint]:
        """All of them, the newest first."""
        with self._engine.connect() as connection:
            rows = connection.execute(select(DISABLED_ENDPOINTS).order_by(DISABLED_ENDPOINTS.c.disabled_at.desc()))
            return [DisabledEndpoint(*row) for row in rows]

    def _select(self, query: Select[Any]) -> list[Delivery]:
        with self._engine.connect() as connection:
            return [Delivery(*row) for row in connection.execute(query)]

    def _disable(self, connection: Connection, url: str, reason: str) -> None:
        row = {"url": url, "reason": reason, "disabled_at": self._now()}
        connection.execute(self._insert(DISABLED_ENDPOINTS).values(row).on_conflict_do_nothing(index_elements=["url"]))

    def _end(self, connection: Connection, event_id: str, state: str, status: int | None, error: str | None) -> None:
        values = {"state": state, "status": status, "error": error, "ended_at": self._now()}
        connection.execute(_pending(event_id).values(values))


def _pending(event_id: str) -> Any:
    # Whatever is said of an attempt, it changes no delivery that has ended.
    return update(DELIVERIES).where(DELIVERIES.c.event_id == event_id, DELIVERIES.c.state == PENDING)


def _count(result: CursorResult[Any]) -> int:
    return result.rowcount


def _batches(event_ids: Sequence[str]) -> list[Sequence[str]]:
    return [event_ids[start : start + _BATCH] for start in range(0, len(event_ids), _BATCH)]
