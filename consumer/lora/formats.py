"""Any LoRA file becomes canonical deltas, or is refused with a reason."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from consumer.errors import LoraInvalid
from consumer.lora.deltas import Delta, ParsedLora
from schemas.lora.errors import LoraUnusable
from schemas.lora.header import not_safetensors, read_header, shown
from schemas.lora.plan import LoraPlan, plan
from schemas.lora.shapes import ModelShapes

# Beyond it a weight overflows in half precision, and the picture is NaN.
MAX_CHANGE = torch.finfo(torch.float16).max


def parse(path: Path, model: ModelShapes) -> ParsedLora:
    """Reads a LoRA file for a model: PEFT's, diffusers' and kohya's names, linear and convolution layers.

    Raises LoraInvalid for every file that is not wholly understood, and OSError where it cannot be read. Weights are
    read only when names, dtypes, shapes and alphas have passed.
    """
    try:
        planned = plan(path, read_header(path), model)
        return ParsedLora(_read_deltas(path, planned), planned.skipped)
    except LoraUnusable as error:
        raise LoraInvalid(str(error), details=error.details) from None


def read_tensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The named tensors, copied out of the file.

    Raises LoraUnusable where the format's own reader refuses the file.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name).clone() for name in names}
    except (SafetensorError, ValueError) as error:
        raise not_safetensors(f"its reader refuses it ({type(error).__name__})") from None


def _read_deltas(path: Path, planned: LoraPlan) -> tuple[Delta, ...]:
    tensors = read_tensors(path, [name for delta in planned.deltas.values() for name in (delta.down, delta.up)])
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise LoraUnusable(f"The tensor '{shown(name)}' has NaN or Inf.", details={"tensor": shown(name)})
    return tuple(
        _checked(Delta(module, tensors[delta.down].flatten(1), tensors[delta.up].flatten(1), delta.alpha))
        for module, delta in planned.deltas.items()
    )


def _checked(delta: Delta) -> Delta:
    # By Cauchy-Schwarz no entry of up @ down is larger than this.
    bound = abs(delta.factor) * _largest_norm(delta.up, dim=1) * _largest_norm(delta.down, dim=0)
    if not bound < MAX_CHANGE:
        raise LoraUnusable(
            f"The LoRA's values for {delta.module} are too large: weights would overflow.",
            details={"module": delta.module},
        )
    return delta


def _largest_norm(matrix: Tensor, dim: int) -> float:
    return float(torch.linalg.vector_norm(matrix, dim=dim, dtype=torch.float32).max())
