"""The demo's jobs on their way: submitted, watched, and heard of by the listener, as a backend would do it."""

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from redis.asyncio import Redis

from demo.jobs import PlannedJob
from demo.servers import ServerFailed
from demo.stack import Stack
from producer import listener
from producer.cli.wait import wait_for
from producer.client import AsyncGenerationClient
from producer.errors import JobUnknown, ProducerError
from producer.settings import ProducerSettings
from schemas.events import CancelledEvent, FailedEvent, SucceededEvent, TerminalEvent
from schemas.keys import Keys, Priority

_TIMEOUT_S = 300.0
_LAST_EVENTS_S = 10.0
_LOOK_S = 0.2
_TERMINAL = ("generation.succeeded", "generation.failed", "generation.cancelled")


async def run_jobs(stack: Stack, jobs: Sequence[PlannedJob], say: Callable[[str], None]) -> dict[str, TerminalEvent]:
    """Submits the jobs, shows how they come along, and returns the terminal events that the listener has stored.

    Raises ServerFailed if the consumer dies or hangs, Interrupted, and ProducerError where a job is not taken.
    """
    arrived: dict[str, TerminalEvent] = {}
    complete, stop = asyncio.Event(), asyncio.Event()
    async with (
        AsyncGenerationClient.from_settings(stack.settings) as client,
        listener.from_settings(stack.settings) as listening,
    ):

        @listening.on(*_TERMINAL)
        async def keep(event: SucceededEvent | FailedEvent | CancelledEvent) -> None:
            arrived[event.data.job_id] = event
            if len(arrived) == len(jobs):
                complete.set()

        hearing = asyncio.create_task(listening.run(stop))
        try:
            await _while_consumed(stack, _wait_for_consumer(client))
            await _submit(client, stack.settings, jobs)
            say(f"submitted   {len(jobs)} jobs")
            await _while_consumed(stack, _follow(client, [job.job_id for job in jobs]))
            with suppress(TimeoutError):  # whichever event is missing then is told of with the other checks
                await asyncio.wait_for(complete.wait(), _LAST_EVENTS_S)
        finally:
            stop.set()
            await hearing
    return arrived


async def _wait_for_consumer(client: AsyncGenerationClient) -> None:
    while True:
        if (await client.queue.stats())["consumers"]:
            return
        await asyncio.sleep(_LOOK_S)


async def _submit(client: AsyncGenerationClient, settings: ProducerSettings, jobs: Sequence[PlannedJob]) -> None:
    # What was added by hand is unknown until a consumer reaches it: it goes first, to be shown with the others.
    async with Redis.from_url(settings.redis_url.get_secret_value()) as redis:
        for job in (job for job in jobs if job.by_hand):
            payload = json.dumps({"job_id": job.job_id, **job.fields})
            await redis.xadd(Keys(settings.prefix).requests(Priority.HIGH), {"payload": payload})
    outcomes = await client.submit_many({"job_id": job.job_id, **job.fields} for job in jobs if not job.by_hand)
    for outcome in outcomes:
        if isinstance(outcome, ProducerError):
            raise outcome


async def _follow(client: AsyncGenerationClient, job_ids: list[str]) -> None:
    for job_id in job_ids:
        await _wait_until_known(client, job_id)
    await wait_for(client, job_ids, timeout_s=None, as_json=False)


async def _wait_until_known(client: AsyncGenerationClient, job_id: str) -> None:
    while True:
        with suppress(JobUnknown):
            await client.status(job_id)
            return
        await asyncio.sleep(_LOOK_S)


async def _while_consumed(stack: Stack, work: Coroutine[Any, Any, None]) -> None:
    """Awaits `work`, as long as the consumer lives and `_TIMEOUT_S` have not passed."""
    task = asyncio.create_task(work)
    deadline = asyncio.get_running_loop().time() + _TIMEOUT_S
    try:
        while not (await asyncio.wait({task}, timeout=_LOOK_S))[0]:
            stack.check()
            if asyncio.get_running_loop().time() > deadline:
                raise ServerFailed(
                    f"the consumer is not ready with it after {_TIMEOUT_S:g} s: see {stack.consumer_log}"
                )
        task.result()
    finally:
        task.cancel()
        await asyncio.wait({task})
