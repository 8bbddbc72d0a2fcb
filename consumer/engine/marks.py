"""Marks in the device's work: to wait for one without spinning, and to tell how long the work before it took."""

import time
from collections.abc import Hashable
from itertools import pairwise

import torch


class Marks:
    """Named marks on the current stream of a GPU; on a CPU work is done when it is called.

    A name that is set again moves to the end.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._events: dict[Hashable, torch.cuda.Event] = {}
        self._set_at: dict[Hashable, float] = {}

    def begin(self) -> None:
        """Forgets what was set; the first mark counts from here."""
        self._set_at.clear()
        self.set(None)

    def set(self, name: Hashable) -> None:
        self._set_at.pop(name, None)
        self._set_at[name] = time.perf_counter()
        if self._on_gpu:
            if name not in self._events:
                self._events[name] = _event()
            self._events[name].record()

    def wait(self, name: Hashable) -> None:
        """Until everything before the mark is done. Other Python threads run meanwhile."""
        if self._on_gpu:
            self._events[name].synchronize()

    def seconds(self) -> dict[Hashable, float]:
        """By each mark, how long the device worked, or waited, since the one before it."""
        return {name: self._between(before, name) for before, name in pairwise(self._set_at)}

    def _between(self, first: Hashable, second: Hashable) -> float:
        if not self._on_gpu:
            return self._set_at[second] - self._set_at[first]
        self._events[second].synchronize()
        milliseconds: float = self._events[first].elapsed_time(self._events[second])
        return milliseconds / 1000


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]  # torch has no types
