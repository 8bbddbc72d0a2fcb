"""`/v1/jobs`: the queue itself, for callers that do not hold the line."""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated, TypeVar

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from redis.exceptions import RedisError

from producer.errors import ProducerError
from producer.gateway.admission import admit
from producer.gateway.answers import Accepted, Cancellation, JobDocument
from producer.gateway.bodies import IdempotencyKey, read_json, wire_request
from producer.gateway.errors import document
from producer.gateway.openapi import ALWAYS, EVENT_STREAM, JOB_BODY, SUBMISSION, UNKNOWN
from producer.gateway.state import Gateway, TheGateway
from producer.gateway.tasks import stop
from producer.jobs import JobStatus, Progress
from schemas.events import EventError
from schemas.fields import JOB_ID_PATTERN
from schemas.keys import Priority

T = TypeVar("T")

JobId = Annotated[str, Path(json_schema_extra={"pattern": JOB_ID_PATTERN}, examples=["order-1041"])]
TheirPriority = Annotated[Priority, Query(description="Which of the three streams the job waits in.")]
LastEventId = Annotated[str | None, Header(alias="Last-Event-ID", description="What an EventSource sends by itself.")]

router = APIRouter(prefix="/v1/jobs")


class NothingMore(Exception):
    """The follower has seen the job's last event."""


@router.post("", status_code=202, responses=ALWAYS | SUBMISSION, openapi_extra=JOB_BODY)
async def submit(
    gateway: TheGateway,
    request: Request,
    response: Response,
    idempotency_key: IdempotencyKey = None,
    priority: TheirPriority = Priority.NORMAL,
) -> Accepted:
    """Submits a job, or finds the one that this body and id have made.

    One that was cancelled, or failed and could succeed, runs again.
    """
    job = await admit(gateway.client, wire_request(await read_json(request), idempotency_key), priority)
    response.headers["Location"] = f"/v1/jobs/{job.job_id}"
    return Accepted(job_id=job.job_id, run=job.run, state=job.state, duplicate=job.duplicate)


@router.get("/{job_id}", responses=ALWAYS | UNKNOWN)
async def status(gateway: TheGateway, job_id: JobId) -> JobDocument:
    """How far a job has come, and its terminal event."""
    return JobDocument.model_validate(await gateway.client.status(job_id), from_attributes=True)


@router.delete("/{job_id}", responses=ALWAYS | UNKNOWN)
async def cancel(gateway: TheGateway, job_id: JobId) -> Cancellation:
    """Cancels a job: at once if it waits, else at its consumer's next step."""
    await gateway.client.status(job_id)
    outcome = await gateway.client.cancel(job_id)
    return Cancellation(job_id=job_id, verdict=outcome.verdict, state=outcome.state)


async def _followed(gateway: TheGateway, job_id: JobId, last: LastEventId = None) -> AsyncIterator[JobStatus]:
    """The job that is followed; whoever follows it waits for it."""
    found = await gateway.client.status(job_id)
    if found.event is not None and last == found.event.id:
        raise NothingMore
    async with gateway.waiters.waiting(job_id):
        yield found


Followed = Annotated[JobStatus, Depends(_followed)]


@router.get("/{job_id}/events", response_class=EventSourceResponse, responses=ALWAYS | UNKNOWN | EVENT_STREAM)
async def follow(gateway: TheGateway, followed: Followed, last: LastEventId = None) -> AsyncIterator[ServerSentEvent]:
    """Follows a job: an event `progress` for each step, then its terminal event, which ends the stream.

    Comments keep the connection alive. With `Last-Event-ID` it goes on behind that event; 204 if that was the last.
    """
    run, number, seen = followed.run, 0, _steps_seen(last, followed.run)
    try:
        items = _until_closing(gateway, gateway.client.events(followed.job_id, run=run))
        async with aclosing(items):
            async for item in items:
                number += 1
                if not isinstance(item, Progress):
                    yield ServerSentEvent(event=item.type, id=item.id, raw_data=item.encode().decode())
                elif number > seen:
                    yield ServerSentEvent(event="progress", id=f"{run}.{number}", data=item)
    except (ProducerError, EventError, RedisError) as error:
        yield ServerSentEvent(event="problem", data=document(error))


def _steps_seen(last_event_id: str | None, run: int) -> int:
    seen = re.fullmatch(r"([0-9]{1,9})\.([0-9]{1,9})", last_event_id or "", re.ASCII)
    return int(seen[2]) if seen is not None and int(seen[1]) == run else 0


async def _until_closing(gateway: Gateway, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """Yields the items until the gateway shuts down."""
    coming: asyncio.Queue[T | Exception | None] = asyncio.Queue()

    async def fetch() -> None:
        try:
            async with aclosing(items):
                async for item in items:
                    coming.put_nowait(item)
        except Exception as error:
            coming.put_nowait(error)
        coming.put_nowait(None)

    # a task of its own: this generator may be cancelled in any place, and more than once
    fetching, ending = asyncio.create_task(fetch()), asyncio.create_task(gateway.closing.wait())
    ending.add_done_callback(lambda _: coming.put_nowait(None))
    try:
        while (item := await coming.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        gateway.background.start(stop(fetching, ending))
