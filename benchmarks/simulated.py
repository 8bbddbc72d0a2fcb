"""`python -m benchmarks.simulated SECONDS`: the real consumer around a GPU that takes so long for a picture.

What is left to measure is everything but the drawing: whether the next picture is ready in time on this machine.
"""

import sys
import time
from collections.abc import Sequence
from functools import partial

import numpy as np

from consumer.__main__ import main
from consumer.engine import Engine, GeneratedImage, LoraFile, OnStep, PreparedLoras
from consumer.settings import ConsumerSettings
from schemas.requests import GenerationRequest


class SleepingEngine:
    """Sleeps instead of drawing: noise, which is what a PNG encoder finds hardest to store."""

    base_model = "simulated"
    gpu = "simulated"

    def __init__(self, picture_s: float) -> None:
        self._picture_s = picture_s
        self._random = np.random.default_rng(0)

    def prepare(self, files: Sequence[LoraFile]) -> PreparedLoras:
        for file in files:
            file.path.read_bytes()
        return PreparedLoras()

    def generate(self, request: GenerationRequest, loras: PreparedLoras, on_step: OnStep) -> GeneratedImage:
        began = time.perf_counter()
        pixels = self._random.integers(0, 256, (request.height, request.width, 3), dtype=np.uint8)
        for step in range(1, request.steps + 1):
            due = began + self._picture_s * step / request.steps
            time.sleep(max(0.0, due - time.perf_counter()))
            on_step(step, request.steps)
        return GeneratedImage(pixels, seconds=time.perf_counter() - began)

    def warm_up(self) -> None:
        """There is nothing to warm."""


def load(picture_s: float, settings: ConsumerSettings) -> Engine:
    return SleepingEngine(picture_s)


if __name__ == "__main__":
    main(partial(load, float(sys.argv[1])))
