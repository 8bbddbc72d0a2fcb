"""From LoRA files to what an engine patches in, the same for every engine."""

from collections.abc import Sequence

import torch

from consumer.engine.common import describe
from consumer.engine.protocol import LoraFile, PreparedLoras
from consumer.errors import GpuOutOfMemory, ModelBroken
from consumer.lora.deltas import ParsedLora
from consumer.lora.formats import parse
from consumer.lora.weights import PatchableWeights
from schemas.events import AppliedLora
from schemas.lora.shapes import ModelShapes


def prepare(files: Sequence[LoraFile], shapes: ModelShapes, weights: PatchableWeights) -> PreparedLoras:
    """Reads and checks LoRA files for a model, and sends them to its device. For any thread.

    Raises LoraInvalid, GpuOutOfMemory, ModelBroken (the device is lost), and OSError where a file cannot be read.
    """
    if not files:
        return PreparedLoras()
    parsed = [parse(file.path, shapes) for file in files]
    try:
        patch = weights.prepare([(lora.deltas, file.ref.scale) for lora, file in zip(parsed, files, strict=True)])
    except torch.OutOfMemoryError:
        raise GpuOutOfMemory("The GPU has not enough memory for the LoRAs.") from None
    except torch.AcceleratorError as error:
        if "out of memory" in str(error):  # the host's, for pages that the GPU reads from
            raise GpuOutOfMemory("The host has not enough page-locked memory for the LoRAs.") from None
        # after a fault the driver answers nothing
        raise ModelBroken(f"The device is lost: {describe(error)}") from None
    applied = tuple(_applied(file, lora) for file, lora in zip(files, parsed, strict=True))
    warnings = tuple(_warning(file, lora) for file, lora in zip(files, parsed, strict=True) if lora.skipped)
    return PreparedLoras(applied, warnings, patch)


def _applied(file: LoraFile, lora: ParsedLora) -> AppliedLora:
    return AppliedLora(
        name=file.ref.name,
        version=file.ref.version,
        scale=file.ref.scale,
        modules=lora.modules if file.ref.scale else 0,
        skipped=len(lora.skipped),
    )


def _warning(file: LoraFile, lora: ParsedLora) -> str:
    first = ", ".join(lora.skipped[:3])
    return f"{file.ref.name}: {len(lora.skipped)} tensors match nothing in the model: {first}"
