"""What a consumer needs of its GPU, told without the libraries that draw: those take seconds to import."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from schemas.events import AppliedLora
from schemas.requests import GenerationRequest, LoraRef

if TYPE_CHECKING:
    from consumer.lora.weights import Patch

OnStep = Callable[[int, int], None]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA's file on this machine, and what the request says of it."""

    path: Path
    ref: LoraRef


@dataclass(frozen=True, slots=True)
class PreparedLoras:
    """The LoRAs of one job, checked and ready to be patched in. `applied`: what its event will say of each.

    `patch`: for the weights of the engine that prepared it; None where there is nothing to patch in.
    """

    applied: tuple[AppliedLora, ...] = ()
    warnings: tuple[str, ...] = ()
    patch: "Patch | None" = None


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """A picture: uint8 [height, width, 3]. `seconds`: denoising and decoding. `sampler`: the scheduler's usual name."""

    pixels: Pixels
    seconds: float
    loras: tuple[AppliedLora, ...] = ()
    warnings: tuple[str, ...] = ()
    sampler: str = "Euler"


class Engine(Protocol):
    """Draws pictures. `prepare` may run in one thread while `generate` runs in another."""

    @property
    def base_model(self) -> str: ...

    @property
    def gpu(self) -> str: ...

    def prepare(self, files: Sequence[LoraFile]) -> PreparedLoras: ...

    def generate(self, request: GenerationRequest, loras: PreparedLoras, on_step: OnStep) -> GeneratedImage: ...

    def warm_up(self) -> None: ...
