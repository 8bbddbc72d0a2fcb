"""Being told to stop: the first time gently, the second time at once."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
_ASK_AGAIN_S = 1.0


class Stop:
    """`asked`: take no more, end what has begun. `urgent`: hand that back as well."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.urgent = asyncio.Event()

    def request(self) -> None:
        """A signal handler of the loop."""
        if self.asked.is_set():
            self.urgent.set()
        self.asked.set()

    async def unless_asked(self, work: Coroutine[Any, Any, T], *, grace_s: float = 0.0) -> T | None:
        """The result of `work`; None when asked to stop first, after which it has `grace_s` before it is cancelled."""
        task, asked = asyncio.ensure_future(work), asyncio.ensure_future(self.asked.wait())
        waiting: set[asyncio.Future[Any]] = {task, asked}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                await asyncio.wait({task}, timeout=grace_s)
            if task.done():
                return task.result()
        finally:
            asked.cancel()
            await end(task)
        return None


async def end(task: asyncio.Future[Any]) -> None:
    """Cancels until the task has ended: before Python 3.12 a cancellation that meets a reply from Redis is lost."""
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=_ASK_AGAIN_S)
