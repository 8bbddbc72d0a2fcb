"""Room for jobs, and the suspects that get all of it."""

import asyncio

from consumer.slots import Slots
from consumer.stopping import Stop

PLACE = ("stream", "1-0")


async def test_no_more_fit_in_than_there_are_slots() -> None:
    """Guards the semaphore in `Slots.take`."""
    slots = Slots(2, Stop())
    first, second = await slots.take(), await slots.take()
    third = asyncio.create_task(slots.take())
    await asyncio.sleep(0)
    assert first is not None
    assert second is not None
    assert not third.done()
    first.close()
    assert await third is not None


async def test_a_suspect_waits_until_it_is_alone_and_frees_all_in_the_end() -> None:
    """Guards the loop in `Slots.clear_for`."""
    slots = Slots(2, Stop())
    other, own = await slots.take(), await slots.take()
    assert other is not None
    assert own is not None
    slots.suspects.add(PLACE)
    clearing = asyncio.create_task(slots.clear_for(PLACE, own))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not clearing.done()
    other.close()
    await clearing
    assert not slots.suspects
    own.close()
    assert [await slots.take() is not None for _ in range(2)] == [True, True]


async def test_who_is_no_suspect_waits_for_nobody() -> None:
    slots = Slots(2, Stop())
    slots.suspects.add(PLACE)
    _, own = await slots.take(), await slots.take()
    assert own is not None
    await slots.clear_for(("stream", "2-0"), own)


async def test_a_stop_ends_the_wait() -> None:
    """Guards `unless_asked` in `Slots.take`."""
    stop = Stop()
    slots = Slots(2, stop)
    _, own = await slots.take(), await slots.take()
    assert own is not None
    slots.suspects.add(PLACE)
    clearing = asyncio.create_task(slots.clear_for(PLACE, own))
    await asyncio.sleep(0)
    stop.request()
    await asyncio.wait_for(clearing, 5)
    assert await slots.take() is None
