"""How requests leave this backend: into the queue, or to an endpoint that answers with the picture."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

from examples.backend.content import Outcome
from examples.backend.endpoint import open_endpoint
from examples.backend.settings import BackendSettings
from examples.backend.tables import OutboxEntry
from producer.async_client import AsyncGenerationClient
from producer.errors import ProducerError
from producer.jobs import Job
from schemas.keys import Priority

# A Job: its outcome will come as an event. An Outcome: here it is. QueueFull: not now. Any other error: never.
Answer = Job | Outcome | ProducerError
Publish = Callable[[Sequence[OutboxEntry]], Awaitable[Sequence[Answer]]]


@asynccontextmanager
async def open_publisher(settings: BackendSettings) -> AsyncIterator[Publish]:
    """Publishes as `LORA_PROVIDER` says."""
    if settings.provider == "modal":
        async with AsyncGenerationClient.from_settings(settings) as client:
            yield partial(to_queue, client)
    else:
        async with open_endpoint(settings) as endpoint:
            yield endpoint.generate_many


async def to_queue(client: AsyncGenerationClient, entries: Sequence[OutboxEntry]) -> list[Answer]:
    """Submits them all, priority by priority, in few round trips. Raises redis.RedisError."""
    answers: dict[str, Answer] = {}
    for priority in Priority:
        batch = [entry for entry in entries if entry.priority == priority]
        outcomes = await client.submit_many([entry.request for entry in batch], priority=priority)
        answers |= zip((entry.job_id for entry in batch), outcomes, strict=True)
    return [answers[entry.job_id] for entry in entries]
