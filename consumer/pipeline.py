"""The stock diffusers pipeline: loading it, and what goes in and comes out of its denoising loop."""

from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

from consumer.engine import common
from consumer.engine.protocol import Pixels
from schemas.requests import GenerationRequest

_SAMPLERS = {"EulerDiscreteScheduler": "Euler", "EulerAncestralDiscreteScheduler": "Euler a", "DDIMScheduler": "DDIM"}


def load_pipeline(model: str, vae: str | None, device: torch.device, dtype: torch.dtype, token: str | None) -> Any:
    """Loads an SDXL pipeline onto a device, from safetensors only.

    Raises whatever diffusers, the hub's client or the device raise.
    """
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()  # their warnings quote prompts
        logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "token": token}
    parts = {} if vae is None else {"vae": AutoencoderKL.from_pretrained(vae, **options)}
    options |= {"add_watermarker": False, **parts}
    if device.type == "cuda":
        try:
            pipeline = StableDiffusionXLPipeline.from_pretrained(model, variant="fp16", **options)
        except (OSError, ValueError):
            pipeline = StableDiffusionXLPipeline.from_pretrained(model, **options)
    else:
        pipeline = StableDiffusionXLPipeline.from_pretrained(model, **options)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    if pipeline.vae.dtype == torch.float16 and pipeline.vae.config.force_upcast:
        # It overflows in float16; the stock pipeline casts it forth and back for every picture.
        pipeline.vae.to(torch.float32)
    return pipeline


def sampler_name(pipeline: Any) -> str:
    """What people call the pipeline's scheduler."""
    scheduler = type(pipeline.scheduler).__name__
    return _SAMPLERS.get(scheduler, scheduler)


def noise(pipeline: Any, request: GenerationRequest, generator: torch.Generator) -> Tensor:
    """The latents to start from, [1, channels, height / 8, width / 8]: of one seed the same on every device."""
    start = common.noise(request, generator, pipeline.unet.config.in_channels, pipeline.vae_scale_factor)
    return start.to(pipeline.device, pipeline.unet.dtype)


@torch.no_grad()
def decode(pipeline: Any, latents: Tensor) -> Pixels:
    """Latents [1, channels, height / 8, width / 8] to uint8 [height, width, 3], rounded as the stock pipeline does.

    Raises GenerationFailed for a picture with NaN or Inf, or one that is all black.
    """
    image = pipeline.vae.decode(_unscale(latents, pipeline.vae), return_dict=False)[0]
    common.refuse_nan(bool(torch.isfinite(image).all()))
    picture = pipeline.image_processor.postprocess(image, output_type="np")[0]
    pixels: Pixels = (picture * 255).round().astype(np.uint8)
    common.refuse_black(pixels)
    return pixels


def _unscale(latents: Tensor, vae: Any) -> Tensor:
    latents = latents.to(vae.dtype)
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or std is None:
        return latents / float(vae.config.scaling_factor)
    mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    unscaled: Tensor = latents * std / vae.config.scaling_factor + mean
    return unscaled


def cut_prompts(pipeline: Any, request: GenerationRequest) -> list[str]:
    """A warning for each prompt that is longer than a text encoder reads."""
    tokenizers = (pipeline.tokenizer, pipeline.tokenizer_2)
    return common.cut_prompts(request, [(partial(_count, each), each.model_max_length) for each in tokenizers])


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text).input_ids)
