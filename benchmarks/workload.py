"""What every engine is measured with: one picture after another, each with another LoRA."""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch

from consumer.engine import Pixels
from schemas.fields import SIDES
from schemas.requests import GenerationRequest

SCALE = 0.8
_PROMPT = "a red fox in snow, soft light, detailed"


@dataclass(frozen=True, slots=True)
class Workload:
    """`model`: a diffusers folder. `loras`: a file for each picture; those of the first `warm_ups` do not count."""

    model: Path
    loras: Sequence[Path]
    warm_ups: int
    device: str
    dtype: str
    speed: str = "auto"
    rank: int = 32
    width: int = 1024
    height: int = 1024
    steps: int = 28
    cfg: float = 5.5

    @classmethod
    def of(cls, arguments: argparse.Namespace, loras: Sequence[Path], *, warm_ups: int) -> Self:
        """The workload of a command line with the options of `add_options`."""
        width, height = arguments.size or (1024, 1024)
        return cls(
            model=arguments.model,
            loras=loras,
            warm_ups=warm_ups,
            device=arguments.device,
            dtype=arguments.dtype,
            rank=arguments.rank,
            width=width,
            height=height,
            steps=arguments.steps,
            cfg=arguments.cfg,
        )

    def request(self, number: int) -> GenerationRequest:
        """The picture of that number: the same for every engine."""
        return GenerationRequest(
            job_id=f"bench-{number}",
            prompt=_PROMPT,
            negative_prompt="blurry",
            seed=number,
            width=self.width,
            height=self.height,
            steps=self.steps,
            cfg=self.cfg,
        )

    def described(self) -> dict[str, Any]:
        """What of it belongs to a result: figures of different workloads do not compare."""
        return {
            "size": f"{self.width}x{self.height}",
            "steps": self.steps,
            "cfg": self.cfg,
            "rank": self.rank,
            "lora_mb": round(self.loras[0].stat().st_size / 1e6, 1),
            "model": self.model.name,
            "device": self.device,
            "dtype": self.dtype,
        }


class Contender(Protocol):
    """One way to draw the workload's pictures. `pixels`: the last one, uint8 [height, width, 3]."""

    pixels: Pixels

    def draw(self, number: int) -> dict[str, float]:
        """Draws one picture from its LoRA's file to its PNG. Returns seconds by part, in order."""
        ...


class Laps:
    """A stopwatch for the parts of one picture. A part ends when the device has done what it was asked for."""

    def __init__(self, device: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._on_gpu = torch.device(device).type == "cuda"
        self._clock = clock
        self.seconds: dict[str, float] = {}
        self._last = self._now()

    def end(self, part: str) -> float:
        """Ends a part; returns its seconds. Parts of one name add up."""
        now = self._now()
        took_s, self._last = now - self._last, now
        self.seconds[part] = self.seconds.get(part, 0.0) + took_s
        return took_s

    def _now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        return self._clock()


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that engines, pictures and starts are measured with."""
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--model", type=Path, required=True, help="a diffusers folder")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", default="float16" if on_gpu else "float32")
    parser.add_argument("--rank", type=int, default=32, help="of the LoRAs")
    parser.add_argument("--size", type=size, help="WIDTHxHEIGHT; 1024x1024 without it")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--cfg", type=float, default=5.5)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")


def size(text: str) -> tuple[int, int]:
    """`1024x768` to width and height. Raises argparse.ArgumentTypeError."""
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) in SIDES for side in sides):
        raise argparse.ArgumentTypeError(f"{text} is no size: two of {', '.join(map(str, SIDES))}, as 1024x768")
    return int(sides[0]), int(sides[1])
