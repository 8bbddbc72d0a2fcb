"""The backend's clients. The one for code without an event loop is the async one, running in a thread of its own."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Self, Unpack

from anyio.from_thread import start_blocking_portal

from producer.async_client import AsyncGenerationClient
from producer.errors import ProducerError
from producer.jobs import CancelOutcome, Job, JobStatus, Progress
from producer.requests import RequestChanges, RequestFields
from producer.settings import ProducerSettings
from producer.storage import PresignedUrls
from schemas.events import SucceededEvent, TerminalEvent
from schemas.keys import Priority
from schemas.requests import GenerationRequest

__all__ = ["AsyncGenerationClient", "GenerationClient"]


class GenerationClient:
    """`AsyncGenerationClient` with the same methods, each of which blocks; safe to share between threads.

    Use it as a context manager, or call `close`. `wake` runs in the client's own event loop.
    """

    def __init__(self, client: AsyncGenerationClient) -> None:
        """Takes a client that no event loop has used yet."""
        self._client = client
        self._stack = ExitStack()
        self._portal = self._stack.enter_context(start_blocking_portal(name="generation-client"))
        self._stack.callback(self._portal.call, self._portal.stop, True)
        self._stack.callback(self._portal.call, client.aclose)

    @classmethod
    def from_settings(cls, settings: ProducerSettings, *, wake: Callable[[], Awaitable[None]] | None = None) -> Self:
        return cls(AsyncGenerationClient.from_settings(settings, wake=wake))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends what is still waiting, too."""
        self._stack.close()

    @property
    def storage(self) -> PresignedUrls | None:
        return self._client.storage

    def submit(
        self,
        request: GenerationRequest | None = None,
        *,
        priority: Priority = Priority.NORMAL,
        presign: bool = False,
        traceparent: str | None = None,
        **fields: Unpack[RequestFields],
    ) -> Job:
        """See `AsyncGenerationClient.submit`."""
        submit = self._client.submit
        call = partial(submit, request, priority=priority, presign=presign, traceparent=traceparent, **fields)
        return self._portal.call(call)

    def submit_many(
        self,
        requests: Iterable[GenerationRequest | RequestFields | Mapping[str, Any]],
        *,
        priority: Priority = Priority.NORMAL,
        presign: bool = False,
        traceparent: str | None = None,
    ) -> list[Job | ProducerError]:
        """See `AsyncGenerationClient.submit_many`."""
        submit_many = self._client.submit_many
        call = partial(submit_many, requests, priority=priority, presign=presign, traceparent=traceparent)
        return self._portal.call(call)

    def resubmit(
        self,
        job_id: str,
        *,
        request: GenerationRequest | None = None,
        run: int | None = None,
        priority: Priority | None = None,
        **changes: Unpack[RequestChanges],
    ) -> Job:
        """See `AsyncGenerationClient.resubmit`."""
        call = partial(self._client.resubmit, job_id, request=request, run=run, priority=priority, **changes)
        return self._portal.call(call)

    def status(self, job_id: str) -> JobStatus:
        """See `AsyncGenerationClient.status`."""
        return self._portal.call(self._client.status, job_id)

    def events(self, job_id: str, *, run: int | None = None) -> Generator[Progress | TerminalEvent, None, None]:
        """See `AsyncGenerationClient.events`."""
        items = self._client.events(job_id, run=run)
        try:
            while (item := self._portal.call(_next, items)) is not None:
                yield item
        finally:
            self._portal.call(items.aclose)

    def result(
        self,
        job_id: str,
        *,
        timeout_s: float | None = None,
        queue_timeout_s: float | None = None,
        run_timeout_s: float | None = None,
        run: int | None = None,
        cancel_on_timeout: bool = False,
        resign: bool = False,
    ) -> SucceededEvent:
        """See `AsyncGenerationClient.result`."""
        call = partial(
            self._client.result,
            job_id,
            timeout_s=timeout_s,
            queue_timeout_s=queue_timeout_s,
            run_timeout_s=run_timeout_s,
            run=run,
            cancel_on_timeout=cancel_on_timeout,
            resign=resign,
        )
        return self._portal.call(call)

    def cancel(self, job_id: str) -> CancelOutcome:
        """See `AsyncGenerationClient.cancel`."""
        return self._portal.call(self._client.cancel, job_id)


async def _next(
    items: AsyncGenerator[Progress | TerminalEvent, None],
) -> Progress | TerminalEvent | None:
    return await anext(items, None)
