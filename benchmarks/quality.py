"""How near the pictures of half precision are to stock diffusers in float32, size by size."""

import functools
import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.our_engine import Load, engine_of
from benchmarks.workload import SCALE, Workload
from consumer.engine import Engine, LoraFile, Pixels
from schemas.requests import LoraRef

Size = tuple[int, int]

SIZES: tuple[Size, ...] = (
    (512, 512),
    (768, 768),
    (1024, 1024),
    (1344, 1344),
    (1536, 1536),
    (768, 1344),
    (1536, 1024),
)
_WINDOW, _DEVIATION = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def compare(workload: Workload, sizes: Sequence[Size] = SIZES, load: Load = engine_of) -> Iterator[dict[str, Any]]:
    """Draws each size with one LoRA in stock float32, and again by stock and by our engine in the workload's dtype.

    The last line is a control: what a LoRA that is an eighth too weak comes to.
    """
    with exact_float32():
        truth = _pictures(workload, sizes, load(workload, "stock", "float32"))
    for speed in dict.fromkeys(("stock", workload.speed)):
        _forget()
        engine = load(workload, speed, workload.dtype)
        name = f"{speed} {workload.dtype}"
        yield from _compared(name, _pictures(workload, sizes, engine), truth)
        if speed == workload.speed:
            weaker = _pictures(workload, sizes[:1], engine, 7 / 8 * SCALE)
            yield from _compared(f"{name}, LoRA at 7/8", weaker, truth)
        del engine  # two would not fit everywhere


def _compared(engine: str, pictures: Mapping[Size, Pixels], truth: Mapping[Size, Pixels]) -> Iterator[dict[str, Any]]:
    for size, pixels in pictures.items():
        yield {"engine": engine, "size": "x".join(map(str, size)), **apart(pixels, truth[size])}


def apart(pixels: Pixels, truth: Pixels) -> dict[str, float | None]:
    """How far two pictures are apart. `psnr_db` is None where they are equal."""
    difference = pixels.astype(np.int16) - truth
    square = float(np.square(difference, dtype=np.float64).mean())
    return {
        "psnr_db": round(10 * float(np.log10(255**2 / square)), 2) if square else None,
        "ssim": round(ssim(pixels, truth), 6),
        "max_difference": int(np.abs(difference).max()),
        "mean_difference": round(float(np.abs(difference).mean()), 4),
    }


def ssim(one: Pixels, other: Pixels) -> float:
    """Structural similarity (Wang et al. 2004: Gaussian window of 11, sigma 1.5), the mean over channels. 1: equal."""
    a, b = (torch.from_numpy(pixels).permute(2, 0, 1).double() for pixels in (one, other))
    mean_a, mean_b = _blurred(a), _blurred(b)
    variance_a, variance_b = _blurred(a * a) - mean_a**2, _blurred(b * b) - mean_b**2
    covariance = _blurred(a * b) - mean_a * mean_b
    same_light = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    same_shape = (2 * covariance + _C2) / (variance_a + variance_b + _C2)
    return float((same_light * same_shape).mean())


@contextmanager
def exact_float32() -> Iterator[None]:
    """float32 without TF32, whose 10 bits would be no truth to compare float16 with."""
    settings: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [one.allow_tf32 for one in settings]
    for one in settings:
        one.allow_tf32 = False
    try:
        yield
    finally:
        for one, allowed in zip(settings, before, strict=True):
            one.allow_tf32 = allowed


def _pictures(workload: Workload, sizes: Sequence[Size], engine: Engine, scale: float = SCALE) -> dict[Size, Pixels]:
    prepared = engine.prepare([LoraFile(workload.loras[0], LoraRef(key="loras/one.safetensors", scale=scale))])
    pictures = {}
    for width, height in sizes:
        request = replace(workload, width=width, height=height).request(1)
        pictures[width, height] = engine.generate(request, prepared, lambda step, total: None).pixels
    return pictures


def _forget() -> None:
    gc.collect()  # the engine before, which had no need of memory but its own
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _blurred(picture: Tensor) -> Tensor:
    """[channels, height, width], without the margin that the window does not fill."""
    taps = torch.exp(-((torch.arange(_WINDOW) - _WINDOW // 2) ** 2) / (2 * _DEVIATION**2)).double()
    for axis in (1, 2):
        length = picture.shape[axis] - _WINDOW + 1
        shifted = (picture.narrow(axis, start, length) * tap for start, tap in enumerate(taps / taps.sum()))
        picture = functools.reduce(torch.add, shifted)
    return picture
