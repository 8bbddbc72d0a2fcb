"""The PNG: pixels, and the parameters that drew them in a text chunk that other tools read."""

import io
import json
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from schemas.events import ModelInfo
from schemas.requests import GenerationRequest

VERSION = "modal-sdxl-lora"


def encode_png(
    pixels: npt.NDArray[np.uint8], request: GenerationRequest, model_info: ModelInfo, *, sampler: str = "Euler"
) -> bytes:
    """Encodes uint8 [height, width, 3], with `parameters_text` in the chunk `parameters`. Same input, same bytes."""
    chunks = PngInfo()
    # Latin-1 becomes tEXt, anything else iTXt.
    chunks.add_text("parameters", parameters_text(request, model_info, sampler))
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG", pnginfo=chunks, compress_level=1)
    return png.getvalue()


def parameters_text(request: GenerationRequest, model_info: ModelInfo, sampler: str) -> str:
    """The parameters as the AUTOMATIC1111 web UI writes them: prompt, negative prompt, one line of `Name: value`.

    LoRAs stand in that line, so that the prompt stays what was asked for. The format has no escape for a prompt with a
    line that itself begins with `Negative prompt:`.
    """
    fields: dict[str, Any] = {
        "Steps": request.steps,
        "Sampler": sampler,
        "CFG scale": request.cfg,
        "Seed": request.effective_seed,
        "Size": f"{request.width}x{request.height}",
        "Model": model_info.base_model,
    }
    if model_info.loras:
        fields["Loras"] = ", ".join(f"<lora:{lora.name}:{lora.scale}>" for lora in model_info.loras)
    fields["Version"] = VERSION
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in fields.items()))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    if any(character in value for character in ",\n:"):
        return json.dumps(value, ensure_ascii=False)
    return value
