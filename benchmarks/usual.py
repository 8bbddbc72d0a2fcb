"""How LoRAs are usually served: diffusers' own calls, one after another, nothing beside them."""

import io
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import urllib3
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from benchmarks.workload import Laps
from schemas.requests import GenerationRequest


def variant(model: Path) -> str | None:
    """The variant of a diffusers folder's files that half precision is loaded from."""
    return "fp16" if any((model / "unet").glob("*.fp16.safetensors")) else None


def stock_pipeline(model: Path, device: str, dtype: str, **parts: Any) -> Any:
    """diffusers' own pipeline of a folder, on `device`, with `parts` in the place of its own."""
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    options = {"dtype": getattr(torch, dtype), "use_safetensors": True, "add_watermarker": False, **parts}
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(model, variant=variant(model), **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


class UsualPipeline:
    """Stock diffusers, with each LoRA loaded, fused, unfused and unloaded again, and PNGs by Pillow."""

    def __init__(self, model: Path, device: str, dtype: str) -> None:
        self.device = device
        self._pipeline = stock_pipeline(model, device, dtype)

    def draw(self, request: GenerationRequest, lora: Path | None, laps: Laps) -> bytes:
        """The PNG of one picture. Parts: load, fuse, draw, unfuse, unload, encode."""
        if lora is not None:
            self._pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
            laps.end("load")
            self._pipeline.fuse_lora(lora_scale=request.lora_scale)
            laps.end("fuse")
        image = self._picture(request)
        laps.end("draw")
        if lora is not None:
            self._pipeline.unfuse_lora()
            laps.end("unfuse")
            self._pipeline.unload_lora_weights()
            laps.end("unload")
        png = io.BytesIO()
        image.save(png, "PNG")
        laps.end("encode")
        return png.getvalue()

    def _picture(self, request: GenerationRequest) -> Any:
        return self._pipeline(
            request.prompt,
            negative_prompt=request.negative_prompt or None,
            width=request.width,
            height=request.height,
            num_inference_steps=request.steps,
            guidance_scale=request.cfg,
            generator=torch.Generator("cpu").manual_seed(request.effective_seed),
        ).images[0]


def serve(
    pipeline: UsualPipeline, request: GenerationRequest, folder: Path, store: Callable[[str, bytes], object]
) -> Mapping[str, float]:
    """One job from LoRA to stored picture, its LoRA in `folder` meanwhile. Returns the seconds of its parts.

    `store`: puts a PNG under a key.
    """
    laps = Laps(pipeline.device)
    file = None
    if request.lora_url is not None:
        file = _download(request.lora_url, folder / f"{request.job_id}.safetensors")
        laps.end("download")
    png = pipeline.draw(request, file, laps)
    store(request.image_key, png)
    laps.end("upload")
    return laps.seconds


def _download(url: str, path: Path) -> Path:
    with urllib3.PoolManager() as pool, path.open("wb") as file:
        response = pool.request("GET", url, preload_content=False)
        if response.status != 200:
            raise RuntimeError(f"the LoRA's store answered {response.status}")
        shutil.copyfileobj(response, file, 1 << 20)
        response.release_conn()
    return path
