"""What every engine does in the same way, without the libraries that draw."""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consumer.engine.protocol import Pixels
from consumer.errors import GenerationFailed
from schemas.redact import redact_text
from schemas.requests import GenerationRequest

_PATH = re.compile(r"(?<![\w:/.])(?:/[^\s/'\",;:)]+)+")


def base_model_name(model: str) -> str:
    """The hub id, or the folder's name."""
    return Path(model).resolve().name if Path(model).exists() else model


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, kernels and graphs are launched on the device: what is the current one is each thread's own matter."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def seeded(request: GenerationRequest) -> torch.Generator:
    """The generator of a picture's noise: on the CPU, so that one seed is the same on every device."""
    return torch.Generator("cpu").manual_seed(request.effective_seed)


def noise(request: GenerationRequest, generator: torch.Generator, channels: int, factor: int) -> Tensor:
    """What a picture starts from: float32 [1, channels, height / factor, width / factor], on the CPU."""
    shape = (1, channels, request.height // factor, request.width // factor)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def cut_prompts(request: GenerationRequest, tokenizers: Sequence[tuple[Callable[[str], int], int]]) -> list[str]:
    """A warning for each prompt that is longer than a text encoder reads.

    `tokenizers`: of each, how many tokens it makes of a text, with both ends, and how many of them are read.
    """
    warnings = []
    for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
        for count, limit in tokenizers:
            tokens = count(text)
            if tokens > limit:
                warnings.append(f"{name} has {tokens} tokens and was cut at {limit}")
                break
    return warnings


def refuse_nan(finite: bool) -> None:
    """Raises GenerationFailed for a picture with NaN or Inf, before it was rounded."""
    if not finite:
        raise GenerationFailed("The model drew a NaN image.")


def refuse_black(pixels: Pixels) -> None:
    """Raises GenerationFailed for a picture that is all black."""
    if not pixels.any():
        raise GenerationFailed("The model drew a black image.")


def describe(error: Exception) -> str:
    """An exception of a library, fit for an event: no secrets, no paths of this machine, not too long."""
    text = _PATH.sub("[path]", redact_text(str(error)))
    return f"{type(error).__name__}: {text}"[:500]
