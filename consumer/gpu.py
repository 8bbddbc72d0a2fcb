"""The thread that has the GPU: it draws one picture after another, and knows how long it waited for each."""

import asyncio
import inspect
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
Clock = Callable[[], float]

_MAY_WAIT = inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


@dataclass(frozen=True, slots=True)
class Waited:
    """Seconds between two pictures. `handover_s`: the part of `gap_s` in which the second one was ready."""

    gap_s: float
    handover_s: float


@dataclass(frozen=True, slots=True)
class Drawn(Generic[T]):
    """A picture, and how long the GPU waited for it; None for the first."""

    image: T
    waited: Waited | None


class GpuThread:
    """Whoever calls `draw` sees to it that nobody else does before it is done."""

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gpu")
        self._free_since: float | None = None

    def ready(self) -> float:
        """The present time: what `draw` is told of a picture that could begin now."""
        return self._clock()

    def draw(self, work: Callable[[], T], *, ready_at: float) -> "asyncio.Future[Drawn[T]]":
        """Runs `work` on the thread, which cannot be stopped from outside."""
        return asyncio.get_running_loop().run_in_executor(self._thread, self._draw, work, ready_at)

    def _draw(self, work: Callable[[], T], ready_at: float) -> Drawn[T]:
        waited = self._waited(ready_at)
        try:
            return Drawn(work(), waited)
        except BaseException as error:
            _clear_frames(error)
            raise
        finally:
            self._free_since = self._clock()

    def _waited(self, ready_at: float) -> Waited | None:
        if self._free_since is None:
            return None
        now = self._clock()
        return Waited(gap_s=now - self._free_since, handover_s=now - max(self._free_since, ready_at))


def _clear_frames(error: BaseException) -> None:
    """Empties its traceback's frames: they keep what the picture had on the GPU, and by the step callback themselves.

    Not those of coroutines and generators: one that has caught the same error may be waiting, and would never go on.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if not frame.f_code.co_flags & _MAY_WAIT:
            with suppress(RuntimeError):  # it is running
                frame.clear()
