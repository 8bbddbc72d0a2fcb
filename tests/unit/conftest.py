"""What the tests of the engine and of LoRAs share. They alone bring torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from consumer.lora.shapes import ModelShapes


@pytest.fixture(scope="session")
def shapes(tiny_model: Path) -> ModelShapes:
    """What LoRAs may change in the tiny model."""
    from demo import loras

    return loras.shapes_of(tiny_model)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Beside other work, threads that wait for each other make a picture ten times slower."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
