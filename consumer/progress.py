"""How far a picture has come, for whoever watches the job, and for whoever watches the GPU."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import structlog
from redis.exceptions import RedisError

from consumer.attempt import Attempt
from consumer.keeper import heed
from consumer.queue import Held, Leases

log = structlog.get_logger(__name__)


class ProgressWriter:
    """Writes the newest step to Redis as fast as Redis takes them; what it cannot write in time is skipped."""

    def __init__(self, attempt: Attempt, leases: Leases, clock: Callable[[], float] = time.monotonic) -> None:
        self._attempt = attempt
        self._leases = leases
        self._clock = clock
        self._started_at = clock()
        self.step = 0
        self._latest: tuple[int, int] | None = None
        self._news = asyncio.Event()
        self._ended = False

    def note(self, step: int, total: int) -> None:
        self.step = step
        self._latest = (step, total)
        self._news.set()

    async def end(self, written: Awaitable[object]) -> None:
        self._ended = True
        self._news.set()
        await written

    async def write(self) -> None:
        """Runs until `end` is called."""
        while not self._ended:
            await self._news.wait()
            self._news.clear()
            if self._latest is not None:
                (step, total), self._latest = self._latest, None
                eta_s = (self._clock() - self._started_at) / step * (total - step)
                await self._write_one(self._leases.progress(self._attempt.lease, step, total, eta_s))

    async def _write_one(self, step: Coroutine[Any, Any, Held]) -> None:
        try:
            heed(self._attempt, await step)
        except RedisError as error:  # progress is a courtesy: the job goes on without
            log.debug("progress.not_written", error=type(error).__name__)
