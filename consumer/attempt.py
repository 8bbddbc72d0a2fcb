"""One attempt at one job: what it holds, how long it has worked, and whether it has been told to stop."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from consumer.errors import AttemptTimeout
from consumer.queue import Begun, Lease
from consumer.stopping import end
from schemas.requests import GenerationRequest

T = TypeVar("T")
Clock = Callable[[], float]
Stage = Literal["preparing", "running", "delivering"]


class Attempt:
    """Shared by the stages, the lease renewal, the progress writer and the GPU thread.

    `stop` is called from the event loop only; `check` may be called from any thread.
    """

    def __init__(
        self, lease: Lease, request: GenerationRequest, run: int, begun: Begun, clock: Clock = time.monotonic
    ) -> None:
        self.lease = lease
        self.request = request
        self.run = run
        self.begun = begun
        self.stage: Stage = "preparing"
        self._clock = clock
        self._begun_at = clock()
        self._worked_s = 0.0
        self._working_since: float | None = None
        self._reason: Exception | None = None
        self._stopped = asyncio.Event()

    @property
    def waited_before_begin_s(self) -> float:
        """Seconds between submission and begin, by the server's clock."""
        return max(0.0, (self.begun.now_ms - self.begun.submitted_at_ms) / 1000)

    @property
    def since_begin_s(self) -> float:
        return self._clock() - self._begun_at

    @property
    def worked_s(self) -> float:
        """Seconds of this attempt's own work so far; waiting for the GPU is none."""
        running = 0.0 if self._working_since is None else self._clock() - self._working_since
        return self._worked_s + running

    @contextmanager
    def working(self) -> Iterator[None]:
        """Counts the time inside as this attempt's own work."""
        self._working_since = self._clock()
        try:
            yield
        finally:
            self._worked_s = self.worked_s
            self._working_since = None

    def stop(self, reason: Exception) -> None:
        """Ends the attempt with `reason` at its next look; the first reason counts."""
        if self._reason is None:
            self._reason = reason
            self._stopped.set()

    def check(self) -> None:
        """Raises the reason to stop if there is one, or AttemptTimeout."""
        if self._reason is not None:
            raise self._reason
        if self.worked_s > self.request.timeout:
            raise self._timeout()

    async def guard(self, work: Coroutine[Any, Any, T]) -> T:
        """Awaits `work`, no longer than the attempt may work and not beyond `stop`; then it is cancelled."""
        left_s = self.request.timeout - self.worked_s if self._working_since is not None else None
        task = asyncio.ensure_future(work)
        stopped = asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait({task, stopped}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise self._reason or self._timeout()
        finally:
            stopped.cancel()
            await end(task)

    def _timeout(self) -> AttemptTimeout:
        return AttemptTimeout(
            f"the attempt worked longer than its timeout of {self.request.timeout} s",
            details={"timeout": self.request.timeout, "stage": self.stage},
        )
