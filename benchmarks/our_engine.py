"""Our engine, through the protocol that a consumer uses."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks.workload import SCALE, Laps, Workload
from consumer.bootstrap import load_engine
from consumer.engine import Engine, GeneratedImage, LoraFile, Pixels, PreparedLoras
from consumer.images import encode_png
from consumer.lora.formats import parse
from consumer.settings import ConsumerSettings
from demo.loras import shapes_of
from schemas.events import ModelInfo
from schemas.requests import LoraRef

Load = Callable[[Workload, str, str], Engine]


def engine_of(workload: Workload, speed: str, dtype: str) -> Engine:
    """The engine that a consumer would load with these settings."""
    values: dict[str, Any] = {
        "SDXL_MODEL": str(workload.model),
        "SDXL_DEVICE": workload.device,
        "SDXL_DTYPE": dtype,
        "SDXL_SPEED": speed,
    }
    return load_engine(ConsumerSettings(**values))


class Ours:
    """The engine of `python -m consumer`; which one it is, the result says."""

    def __init__(self, workload: Workload, load: Load = engine_of) -> None:
        self._workload = workload
        self.engine = load(workload, workload.speed, workload.dtype)
        self.pixels: Pixels = np.zeros((0, 0, 3), np.uint8)

    def draw(self, number: int) -> dict[str, float]:
        """One picture with nothing beside it: file, weights, picture and PNG one after another."""
        laps = Laps(self._workload.device)
        prepared = self._prepare(number)
        laps.end("prepare")
        image = self._generate(number, prepared)
        parts = self._split(laps.end("generate"))
        self._encode(number, image)
        laps.end("png")
        self.pixels = image.pixels
        return {"prepare": laps.seconds["prepare"], **parts, "png": laps.seconds["png"]}

    def sustained(self) -> list[float]:
        """All pictures as a consumer draws them: the next LoRA is prepared, and the last PNG encoded, behind each.

        Returns the seconds from each picture's end to the next one's, warm-ups left out.
        """
        count, warm_ups = len(self._workload.loras), self._workload.warm_ups
        ends, encoded = [], list[Future[int]]()
        with ThreadPoolExecutor(2) as pool:
            prepared = pool.submit(self._prepare, 0)
            for number in range(count):
                ready = prepared.result()
                prepared = pool.submit(self._prepare, (number + 1) % count)
                image = self._generate(number, ready)
                ends.append(time.perf_counter())
                encoded.append(pool.submit(self._encode, number, image))
            for png in encoded:
                png.result()
        return [end - before for before, end in zip(ends[warm_ups - 1 :], ends[warm_ups:], strict=False)]

    def switch(self, runs: int) -> dict[str, list[float]]:
        """What a LoRA costs, piece by piece, each alone: seconds of every run.

        `read`: the file's bytes, from the page cache. `parse`: reading, checking and naming. `prepare`: the same,
        packed and sent to the device. `patch` and `restore`: into the weights, and out of them by the next base
        picture; known of engines that time themselves.
        """
        shapes = shapes_of(self._workload.model)
        pieces: dict[str, list[float]] = {}
        for number in range(runs):
            file = self._workload.loras[number]
            laps = Laps(self._workload.device)
            file.read_bytes()
            laps.end("read")
            parse(file, shapes)
            laps.end("parse")
            prepared = self._prepare(number)
            laps.end("prepare")
            for piece, loras in (("patch", prepared), ("restore", PreparedLoras())):
                self._generate(number, loras)
                if "patch" in self._timings():
                    laps.seconds[piece] = self._timings()["patch"]
            for piece, took_s in laps.seconds.items():
                pieces.setdefault(piece, []).append(took_s)
        return pieces

    def _prepare(self, number: int) -> PreparedLoras:
        path = self._workload.loras[number]
        return self.engine.prepare([LoraFile(path, LoraRef(key=f"loras/{path.name}", scale=SCALE))])

    def _generate(self, number: int, loras: PreparedLoras) -> GeneratedImage:
        return self.engine.generate(self._workload.request(number), loras, lambda step, total: None)

    def _encode(self, number: int, image: GeneratedImage) -> int:
        model = ModelInfo(base_model=self.engine.base_model, lora_applied=bool(image.loras), loras=image.loras)
        return len(encode_png(image.pixels, self._workload.request(number), model, sampler=image.sampler))

    def _timings(self) -> dict[str, float]:
        return dict(getattr(self.engine, "timings", {}))

    def _split(self, took_s: float) -> dict[str, float]:
        known = self._timings()
        return {**known, "rest": took_s - sum(known.values())} if known else {"generate": took_s}
