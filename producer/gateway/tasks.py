"""Ending tasks for certain, and keeping those that nobody waits for."""

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

_AGAIN_S = 0.2
_FINISH_S = 5.0

T = TypeVar("T")


async def stop(*tasks: asyncio.Task[Any]) -> None:
    """Cancels the tasks until they are done.

    Once is not enough: `asyncio.wait_for` before Python 3.12 loses a cancellation that comes at the moment when its
    future is done, and redis-py sends every command through it.
    """
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=_AGAIN_S)


class Background:
    """Tasks that outlive the call that started them, but not the application."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def aclose(self) -> None:
        """Waits until all of them are done, for `_FINISH_S` seconds; what goes on for longer is stopped."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_FINISH_S):
                while self._tasks:
                    await asyncio.wait(self._tasks)
        await stop(*self._tasks)
