"""Waking consumers for what has been submitted."""

from collections.abc import Awaitable, Callable, Iterable

import structlog

from producer.errors import ProducerError
from producer.jobs import Job
from schemas.keys import JobState

Wake = Callable[[], Awaitable[object]]

log = structlog.get_logger(__name__)


async def wake_for(wake: Wake | None, outcomes: Iterable[Job | ProducerError]) -> None:
    """Calls `wake` if one of these jobs is queued; whatever it raises is logged only."""
    # A duplicate may be the answer to a submission whose reply was lost, before anybody was woken.
    if wake is None or not any(isinstance(job, Job) and job.state == JobState.QUEUED for job in outcomes):
        return
    await wake_quietly(wake)


async def wake_quietly(wake: Wake) -> None:
    """Calls `wake`; whatever it raises is logged only."""
    try:
        await wake()
    except Exception as error:
        log.warning("wake_failed", error=type(error).__name__)
