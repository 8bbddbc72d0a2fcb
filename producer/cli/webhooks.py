"""`webhooks`: list, show and retry deliveries; disable and enable endpoints."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, TypeVar

import typer

from producer.cli import output
from producer.cli.command import AsJson, BadUsage, Status, checked_settings
from producer.database import migrate, open_engine
from producer.settings import ProducerSettings
from producer.tables import PENDING
from producer.webhooks.queue import WebhookQueue
from producer.webhooks.rows import Deliveries, Delivery, DisabledEndpoint
from schemas.net.http import place_of

T = TypeVar("T")


class State(StrEnum):
    """`state` of a delivery."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"
    DISABLED = "disabled"


EventId = Annotated[str, typer.Argument(metavar="EVENT_ID")]
MaybeEventIds = Annotated[list[str] | None, typer.Argument(metavar="[EVENT_ID...]", show_default=False)]
Endpoint = Annotated[str, typer.Argument(metavar="URL", help="Its query does not count.")]
OfState = Annotated[State | None, typer.Option("--state", help="Only those in this state.")]
OfJob = Annotated[str | None, typer.Option("--job", metavar="JOB_ID", help="Only those of this job.")]
OfEndpoint = Annotated[str | None, typer.Option("--endpoint", metavar="URL", help="Only those to this URL.")]
Limit = Annotated[int, typer.Option(min=1, max=1_000_000, help="Only the newest so many.")]
Reason = Annotated[str, typer.Option(help="Why, for those who wonder.")]


async def list_deliveries(
    state: OfState = None, job: OfJob = None, endpoint: OfEndpoint = None, limit: Limit = 100, as_json: AsJson = False
) -> Status:
    """List deliveries, the newest first."""
    url = None if endpoint is None else place_of(endpoint)
    found = await _with_rows(lambda rows: rows.find(state=state, job_id=job, url=url, limit=limit))
    if as_json:
        output.print_json([_document(delivery) for delivery in found])
    elif not found:
        output.stdout().print("no deliveries")
    else:
        columns = ("event", "state", "attempts", "status", "due or ended at", "endpoint", "error")
        output.stdout().print(output.table(columns, map(_row, found)))
    return Status.OK


async def show_delivery(event_id: EventId, as_json: AsJson = False) -> Status:
    """Show one delivery."""
    delivery = await _with_rows(lambda rows: rows.get(event_id))
    if delivery is None:
        raise BadUsage(f"there is no delivery of {event_id}")
    if as_json:
        output.print_json(_document(delivery))
    else:
        output.stdout().print(output.facts_grid(_document(delivery)))
    return Status.OK


async def retry_deliveries(event_ids: MaybeEventIds = None, state: OfState = None, as_json: AsJson = False) -> Status:
    """Deliver again, with all attempts anew: the events named, or all that are in one state."""
    if bool(event_ids) + (state is not None) != 1:
        raise BadUsage("give event ids, or --state")

    def retry(rows: Deliveries, queue: WebhookQueue) -> tuple[list[str], list[str]]:
        wanted = list(dict.fromkeys(event_ids or [delivery.event_id for delivery in rows.find(state=state)]))
        revived = set(rows.revive(wanted))
        for delivery in rows.among(sorted(revived)):
            queue.put_back(delivery.event_id, delivery.due_at)
        return [one for one in wanted if one in revived], [one for one in wanted if one not in revived]

    retried, left = await _with_queue(retry)
    if as_json:
        output.print_json({"retried": retried, "left": left})
    else:
        output.stdout().print(f"retried {len(retried)} of {len(retried) + len(left)}")
        for event_id in left:
            output.complain(f"{event_id}: there is no such delivery, or its endpoint is disabled")
    return Status.USAGE if left else Status.OK


async def list_disabled(as_json: AsJson = False) -> Status:
    """List the endpoints that nothing is sent to."""
    endpoints = await _with_rows(lambda rows: rows.disabled_endpoints())
    if as_json:
        output.print_json([_document(endpoint) for endpoint in endpoints])
    elif not endpoints:
        output.stdout().print("no disabled endpoints")
    else:
        rows = ((one.url, output.time_text(one.disabled_at), one.reason) for one in endpoints)
        output.stdout().print(output.table(("endpoint", "disabled at", "reason"), rows))
    return Status.OK


async def disable_endpoint(url: Endpoint, reason: Reason = "by hand", as_json: AsJson = False) -> Status:
    """Send nothing more to an endpoint; its deliveries end as they become due."""
    place = place_of(url)
    await _with_rows(lambda rows: rows.disable(place, reason))
    if as_json:
        output.print_json({"disabled": place})
    else:
        output.stdout().print(f"disabled {output.visible(place)}", soft_wrap=True)
    return Status.OK


async def enable_endpoint(url: Endpoint, as_json: AsJson = False) -> Status:
    """Send to an endpoint again; what it has missed needs a retry."""
    place = place_of(url)
    if not await _with_rows(lambda rows: rows.enable(place)):
        raise BadUsage(f"{place} is not disabled")
    if as_json:
        output.print_json({"enabled": place})
    else:
        output.stdout().print(f"enabled {output.visible(place)}", soft_wrap=True)
    return Status.OK


async def _with_rows(what: Callable[[Deliveries], T]) -> T:
    def run() -> T:
        with _rows(_settings()) as rows:
            return what(rows)

    return await asyncio.to_thread(run)


async def _with_queue(what: Callable[[Deliveries, WebhookQueue], T]) -> T:
    with checked_settings() as settings:
        queue = WebhookQueue(settings.redis_url.get_secret_value(), settings.prefix)
    try:
        return await _with_rows(lambda rows: what(rows, queue))
    finally:
        queue.close()


def _settings() -> ProducerSettings:
    with checked_settings() as settings:
        return settings


@contextmanager
def _rows(settings: ProducerSettings) -> Iterator[Deliveries]:
    engine = open_engine(settings.database_url.get_secret_value())
    try:
        migrate(engine)
        yield Deliveries(engine)
    finally:
        engine.dispose()


def _row(delivery: Delivery) -> tuple[object, ...]:
    when = delivery.due_at if delivery.state == PENDING else delivery.ended_at
    status = "" if delivery.status is None else delivery.status
    facts = (delivery.attempts, status, output.time_text(when), delivery.url, delivery.error or "")
    return delivery.event_id, output.state_text(delivery.state), *facts


def _document(row: Delivery | DisabledEndpoint) -> dict[str, Any]:
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in asdict(row).items()}
