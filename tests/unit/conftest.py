"""What the tests of the engine and of LoRAs share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from schemas.lora.shapes import ModelShapes


@pytest.fixture(scope="session")
def shapes(tiny_model: Path) -> ModelShapes:
    """What LoRAs may change in the tiny model."""
    from demo import loras

    return loras.shapes_of(tiny_model)
