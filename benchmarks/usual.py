"""How LoRAs are usually served: diffusers' own calls, one after another, nothing beside them."""

import io
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import urllib3
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from schemas.requests import GenerationRequest


@dataclass(slots=True)
class Stopwatch:
    """Seconds by part, in the order in which the parts came."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began


class UsualPipeline:
    """Stock diffusers, with each LoRA loaded, fused, unfused and unloaded again, and PNGs by Pillow."""

    def __init__(self, model: Path, device: str, dtype: str) -> None:
        for logging in (diffusers_logging, transformers_logging):
            logging.set_verbosity_error()
            logging.disable_progress_bar()
        variant = "fp16" if any((model / "unet").glob("*.fp16.safetensors")) else None
        self._pipeline: Any = StableDiffusionXLPipeline.from_pretrained(
            model, dtype=getattr(torch, dtype), variant=variant, use_safetensors=True, add_watermarker=False
        )
        self._pipeline.set_progress_bar_config(disable=True)
        self._pipeline.to(device)

    def draw(self, request: GenerationRequest, lora: Path | None, watch: Stopwatch) -> bytes:
        """The PNG of one picture. Parts: load, fuse, draw, unfuse, unload, encode."""
        if lora is not None:
            with watch.part("load"):
                self._pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
            with watch.part("fuse"):
                self._pipeline.fuse_lora(lora_scale=request.lora_scale)
        with watch.part("draw"):
            image = self._picture(request)
        if lora is not None:
            with watch.part("unfuse"):
                self._pipeline.unfuse_lora()
            with watch.part("unload"):
                self._pipeline.unload_lora_weights()
        with watch.part("encode"):
            png = io.BytesIO()
            image.save(png, "PNG")
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
    watch = Stopwatch()
    file = None
    if request.lora_url is not None:
        with watch.part("download"):
            file = _download(request.lora_url, folder / f"{request.job_id}.safetensors")
    png = pipeline.draw(request, file, watch)
    with watch.part("upload"):
        store(request.image_key, png)
    return watch.seconds


def _download(url: str, path: Path) -> Path:
    with urllib3.PoolManager() as pool, path.open("wb") as file:
        response = pool.request("GET", url, preload_content=False)
        if response.status != 200:
            raise RuntimeError(f"the LoRA's store answered {response.status}")
        shutil.copyfileobj(response, file, 1 << 20)
        response.release_conn()
    return path
