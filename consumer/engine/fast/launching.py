"""Launching Triton kernels, or compiling them ahead: side by side, as one after another takes seconds."""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from consumer.triton_support import LAUNCH_OPTIONS


class Launcher:
    """Launches kernels on the current stream."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._compiled: dict[tuple[Any, ...], Future[Any]] = {}

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        constants |= LAUNCH_OPTIONS
        if self._pool is None:
            kernel[grid](*arguments, **constants)
            return
        key = (kernel, *map(_kind, arguments), *sorted(constants.items()))
        if key not in self._compiled:
            self._compiled[key] = self._pool.submit(kernel.warmup, *arguments, grid=grid, **constants)

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Inside, kernels are compiled for what they would be launched with, and not launched.

        At the end all of them are ready. Raises what the compiler raises.
        """
        try:
            with ThreadPoolExecutor(os.cpu_count()) as self._pool:
                yield
        finally:
            self._pool = None
            compiled, self._compiled = self._compiled, {}
        for future in compiled.values():
            future.result()


def _kind(argument: Any) -> object:
    """What of an argument a compilation depends on: its type, and whether it is a multiple of 16."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument % 16 == 0
    return type(argument)
