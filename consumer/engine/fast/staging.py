"""Values of a picture's beginning, sent to the device together.

Each single copy gives Python's lock away, and while the next LoRA is parsed in another thread it may take milliseconds
to come back: two copies do what a dozen would.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes


@dataclass(frozen=True, slots=True)
class Value:
    """What is sent: its type as NumPy and torch name it, such as `float32`, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return np.dtype(self.dtype).itemsize * prod(self.shape)


class Staging:
    """Named arrays on the host, and their twins at fixed addresses on a device."""

    def __init__(self, values: Mapping[str, Value], device: torch.device) -> None:
        ends = accumulate(value.bytes + -value.bytes % _ALIGNMENT for value in values.values())
        starts = [0, *ends]
        self._host = torch.zeros(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(starts[-1], dtype=torch.uint8, device=device)
        self.host: dict[str, npt.NDArray[np.generic]] = {}
        self.device: dict[str, Tensor] = {}
        for start, (name, value) in zip(starts, values.items(), strict=False):
            place = slice(start, start + value.bytes)
            self.host[name] = self._host[place].numpy().view(value.dtype).reshape(value.shape)
            self.device[name] = self._device[place].view(getattr(torch, value.dtype)).view(value.shape)

    def send(self) -> None:
        """Copies everything on the current stream.

        Whoever writes into `host` next has waited for this copy: no picture begins while the device works on another.
        """
        self._device.copy_(self._host, non_blocking=True)
