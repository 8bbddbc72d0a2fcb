"""Values of a picture's beginning, sent to the device together.

Each single copy gives Python's lock away, and while the next LoRA is parsed in another thread it may take milliseconds
to come back: one copy does what a dozen would.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes


@dataclass(frozen=True, slots=True)
class Field:
    """One of the values: its type as NumPy and torch name it, such as `float32`, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        size = np.dtype(self.dtype).itemsize * prod(self.shape)
        return size + -size % _ALIGNMENT


class Staging:
    """Named arrays on the host, and their twins at fixed addresses on a device."""

    def __init__(self, fields: Mapping[str, Field], device: torch.device) -> None:
        size = sum(field.bytes for field in fields.values())
        self._host = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self.host: dict[str, npt.NDArray[np.generic]] = {}
        self.device: dict[str, Tensor] = {}
        start = 0
        for name, field in fields.items():
            place = slice(start, start + np.dtype(field.dtype).itemsize * prod(field.shape))
            self.host[name] = self._host[place].numpy().view(field.dtype).reshape(field.shape)
            self.device[name] = self._device[place].view(getattr(torch, field.dtype)).view(field.shape)
            start += field.bytes

    def send(self) -> None:
        """Copies everything on the current stream. What was sent before must have arrived."""
        self._device.copy_(self._host, non_blocking=True)
