"""Room for jobs in preparation or on the GPU."""

import asyncio
from contextlib import ExitStack

from consumer.queue import Place
from consumer.stopping import Stop


class Slots:
    """`count` jobs fit in; one that may have killed its last consumer goes alone, so that it takes nobody along."""

    def __init__(self, count: int, stop: Stop) -> None:
        self.suspects: set[Place] = set()
        self._count = count
        self._stop = stop
        self._free = asyncio.Semaphore(count)

    async def take(self) -> ExitStack | None:
        """One slot, which is free again when what is returned is closed; None when asked to stop first."""
        if not await self._stop.unless_asked(self._free.acquire()):
            return None
        slot = ExitStack()
        slot.callback(self._free.release)
        return slot

    async def clear_for(self, place: Place, slot: ExitStack) -> None:
        """Waits for the other slots too, and keeps them with `slot`, if the job at `place` is a suspect."""
        if place not in self.suspects:
            return
        self.suspects.remove(place)
        for _ in range(self._count - 1):
            other = await self.take()
            if other is not None:
                slot.push(other)
