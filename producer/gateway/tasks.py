"""Ending tasks for certain, and keeping those that nobody waits for."""

import asyncio
from collections.abc import Coroutine
from typing import Any

_AGAIN_S = 0.2


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
    """Tasks that outlive the call that started them, but not the application. They raise nothing."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def aclose(self) -> None:
        """Waits until all of them are done."""
        if self._tasks:
            await asyncio.wait(self._tasks)
