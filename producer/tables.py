"""The listener's tables, and the rows that an event becomes. SQLAlchemy Core, nothing of one database's own."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Double,
    Index,
    MetaData,
    Table,
    Text,
    TypeDecorator,
)

from producer.completions import Completion
from schemas.events import CancelledEvent, Event, FailedEvent, RetryingEvent, SucceededEvent, is_terminal
from schemas.keys import JobState

Row = dict[str, Any]
UNDECODABLE = "undecodable"
STATES = {
    "generation.started": JobState.RUNNING,
    "generation.retrying": JobState.DELAYED,
    "generation.succeeded": JobState.SUCCEEDED,
    "generation.failed": JobState.FAILED,
    "generation.cancelled": JobState.CANCELLED,
}


class _UtcDateTime(TypeDecorator[datetime]):
    """Aware times in UTC, on databases that keep no zone, too."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None or value.tzinfo is None:
            return value
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


METADATA = MetaData()

JOBS = Table(
    "jobs",
    METADATA,
    Column("job_id", Text, primary_key=True),
    Column("run", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    Column("ended", Boolean, nullable=False),
    Column("attempt", BigInteger, nullable=False),
    Column("error_code", Text),
    Column("error", Text),
    Column("retry_after", Double),
    Column("image_url", Text),
    Column("image_key", Text),
    Column("request_metadata", JSON, nullable=False),
    Column("updated_at", _UtcDateTime, nullable=False),
)

EVENTS = Table(
    "events",
    METADATA,
    Column("event_id", Text, primary_key=True),
    Column("job_id", Text, index=True),
    Column("run", BigInteger),
    Column("type", Text, nullable=False),
    Column("timestamp", _UtcDateTime, nullable=False),
    Column("payload", Text, nullable=False),
)

IMAGES = Table(
    "images",
    METADATA,
    Column("job_id", Text, primary_key=True),
    Column("run", BigInteger, primary_key=True),
    Column("url", Text),
    Column("key", Text),
    Column("sha256", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("width", BigInteger, nullable=False),
    Column("height", BigInteger, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("steps", BigInteger, nullable=False),
    Column("cfg", Double, nullable=False),
    Column("timings", JSON, nullable=False),
    Column("model_info", JSON, nullable=False),
    Column("gpu", Text, nullable=False),
    Column("gpu_seconds", Double, nullable=False),
)

PENDING, DELIVERED, GAVE_UP, DISABLED = "pending", "delivered", "failed", "disabled"

DELIVERIES = Table(
    "deliveries",
    METADATA,
    Column("event_id", Text, primary_key=True),  # `webhook-id`; the body is the event's payload in `events`
    Column("job_id", Text, nullable=False, index=True),
    Column("url", Text, nullable=False),  # without its query
    Column("state", Text, nullable=False),
    Column("attempts", BigInteger, nullable=False),
    Column("due_at", _UtcDateTime, nullable=False),  # of the next attempt, while pending
    Column("status", BigInteger),  # HTTP status of the last attempt that was answered
    Column("error", Text),  # why the last attempt failed
    Column("created_at", _UtcDateTime, nullable=False),
    Column("ended_at", _UtcDateTime),
    Index("ix_deliveries_state_due_at", "state", "due_at"),
)

DISABLED_ENDPOINTS = Table(
    "disabled_endpoints",
    METADATA,
    Column("url", Text, primary_key=True),
    Column("reason", Text, nullable=False),
    Column("disabled_at", _UtcDateTime, nullable=False),
)


def event_row(completion: Completion) -> Row:
    """The row of `events`: the event's own bytes, or what is kept of an undecodable entry."""
    event = completion.event
    payload = completion.payload.decode("utf-8", "backslashreplace")
    return {
        "event_id": completion.event_id,
        "job_id": event.data.job_id if event else None,
        "run": event.data.run if event else None,
        "type": event.type if event else UNDECODABLE,
        "timestamp": event.timestamp if event else completion.published_at,
        "payload": _text(payload),
    }


def job_row(event: Event) -> Row:
    """The row of `jobs` as this event alone would have it."""
    row: Row = {
        "job_id": event.data.job_id,
        "run": event.data.run,
        "state": STATES[event.type].value,
        "ended": is_terminal(event.type),
        "attempt": event.data.attempt,
        **dict.fromkeys(("error_code", "error", "retry_after", "image_url", "image_key")),
        "request_metadata": event.data.request_metadata,
        "updated_at": event.timestamp,
    }
    match event:
        case SucceededEvent():
            row |= {"image_url": _text(event.data.image_url), "image_key": _text(event.data.image_key)}
        case FailedEvent() | RetryingEvent():
            row |= {"error_code": event.data.error_code.value, "error": _text(event.data.error)}
            row["retry_after"] = event.data.retry_after
        case CancelledEvent():
            row["error_code"] = event.data.error_code.value
    return row


def image_row(event: SucceededEvent) -> Row:
    """The row of `images`."""
    data = event.data
    width, height = data.image_size
    return {
        "job_id": data.job_id,
        "run": data.run,
        "url": _text(data.image_url),
        "key": _text(data.image_key),
        "sha256": _text(data.image_sha256),
        "bytes": data.image_bytes,
        "width": width,
        "height": height,
        "seed": data.metadata.seed_used,
        "steps": data.metadata.actual_steps,
        "cfg": data.metadata.actual_cfg,
        "timings": data.timings.model_dump(),
        "model_info": data.model_info.model_dump(mode="json"),
        "gpu": _text(data.gpu),
        "gpu_seconds": data.gpu_seconds,
    }


def delivery_row(event: Event, url: str, now: datetime) -> Row:
    """The row of `deliveries` for a webhook that is to be sent at once."""
    return {
        "event_id": event.id,
        "job_id": event.data.job_id,
        "url": url,
        "state": PENDING,
        "attempts": 0,
        "due_at": now,
        "created_at": now,
    }


def _text(value: str | None) -> str | None:
    return value if value is None else value.replace("\0", "")  # PostgreSQL keeps no NUL in text
