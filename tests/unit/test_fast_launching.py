"""Compiling kernels side by side before they are launched, and recording them; a kernel is anything with a grid."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from consumer.engine.fast.capture import Captured
from consumer.engine.fast.launching import Launcher
from consumer.errors import ModelBroken


class Kernel:
    """Notes what becomes of it."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.done: list[str] = []
        self._failure = failure

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **constants: self.done.append("launched")

    def warmup(self, *arguments: Any, grid: tuple[int, ...], **constants: Any) -> None:
        self.done.append("compiled")
        if self._failure is not None:
            raise self._failure


def test_what_is_compiled_is_not_launched_and_compiled_once() -> None:
    launch, kernel = Launcher(), Kernel()
    with launch.compiling():
        for width in (32, 64, 5):  # the first two are multiples of 16: the same to the compiler
            launch(kernel, (1,), width, BLOCK=8)
    assert kernel.done == ["compiled"] * 2
    launch(kernel, (1,), 32, BLOCK=8)
    assert kernel.done[2:] == ["launched"]


@pytest.mark.parametrize("where", ["in the compiler", "beside it"])
def test_after_a_failure_kernels_are_launched_again(where: str) -> None:
    """Guards the `finally` in `Launcher.compiling`."""
    launch = Launcher()
    kernel = Kernel(ValueError("no") if where == "in the compiler" else None)

    def compile_and_fail() -> None:
        with launch.compiling():
            launch(kernel, (1,), 32)
            if where == "beside it":
                raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        compile_and_fail()
    launch(kernel, (1,), 32)
    assert kernel.done == ["compiled", "launched"]


def test_a_recording_that_the_device_breaks_off_is_the_end_of_this_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards `Captured`: torch does not leave the recording's stream then, so no later picture could be trusted."""

    @contextmanager
    def graph(*_: object, **__: object) -> Iterator[None]:
        yield
        raise torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")

    calls: list[int] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(ModelBroken, match="error during capture"):
        Captured(pool=(0, 1))(lambda: calls.append(1))
    assert calls == [1, 1]
