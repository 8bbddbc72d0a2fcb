"""How long the GPU waited is measured on its own thread, between the end of one picture and the start of the next."""

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest

from consumer.gpu import Drawn, GpuThread, Waited


def at(*times: float) -> Callable[[], float]:
    """A clock that shows these times, one after another."""
    shown: Iterator[float] = iter(times)
    return lambda: next(shown)


async def test_nothing_was_waited_for_before_the_first_picture() -> None:
    assert await GpuThread(at(10.0)).draw(lambda: "a", ready_at=1.0) == Drawn("a", None)


async def test_a_picture_that_was_ready_waits_for_the_handover_alone() -> None:
    gpu = GpuThread(at(10.0, 10.25, 20.0))
    await gpu.draw(lambda: "a", ready_at=1.0)
    assert await gpu.draw(lambda: "b", ready_at=8.0) == Drawn("b", Waited(gap_s=0.25, handover_s=0.25))


async def test_what_a_picture_was_late_by_is_no_handover() -> None:
    gpu = GpuThread(at(10.0, 12.5, 20.0))
    await gpu.draw(lambda: "a", ready_at=1.0)
    assert await gpu.draw(lambda: "b", ready_at=12.25) == Drawn("b", Waited(gap_s=2.5, handover_s=0.25))


async def test_a_picture_that_failed_has_an_end_too() -> None:
    """Guards the `finally` in `GpuThread._draw`."""
    gpu = GpuThread(at(10.0, 10.5, 15.5, 20.0))
    with pytest.raises(ZeroDivisionError):
        await gpu.draw(lambda: 1 / 0, ready_at=1.0)
    assert (await gpu.draw(lambda: "b", ready_at=1.0)).waited == Waited(gap_s=0.5, handover_s=0.5)


async def test_all_pictures_are_drawn_on_one_thread() -> None:
    gpu = GpuThread()
    threads = {(await gpu.draw(threading.get_ident, ready_at=gpu.ready())).image for _ in range(3)}
    assert len(threads) == 1
    assert threading.get_ident() not in threads


async def test_whoever_caught_the_same_error_before_goes_on() -> None:
    """Guards `_clear_frames`: a coroutine whose frame is cleared while it waits is never heard of again."""
    error, caught, go_on = ZeroDivisionError(), asyncio.Event(), asyncio.Event()

    def fail() -> None:
        raise error

    async def wait() -> str:
        try:
            fail()
        except ZeroDivisionError:
            caught.set()
            await go_on.wait()
        return "went on"

    waiting = asyncio.create_task(wait())
    await caught.wait()
    with pytest.raises(ZeroDivisionError):
        await GpuThread().draw(fail, ready_at=0.0)
    go_on.set()
    assert await asyncio.wait_for(waiting, 10) == "went on"
