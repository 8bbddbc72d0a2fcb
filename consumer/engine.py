"""Draws pictures: the base model, the LoRAs of one job patched into it, and the stock diffusers pipeline around them."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import structlog
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

from consumer.errors import GenerationFailed, GpuOutOfMemory, ModelBroken, WorkerError
from consumer.lora.deltas import ParsedLora
from consumer.lora.formats import parse
from consumer.lora.shapes import ModelShapes
from consumer.lora.weights import PatchableWeights
from schemas.events import AppliedLora
from schemas.redact import redact_text
from schemas.requests import GenerationRequest, LoraRef

Pixels = npt.NDArray[np.uint8]
OnStep = Callable[[int, int], None]

_PATH = re.compile(r"(?<![\w:/.])(?:/[^\s/'\",;:)]+)+")
_SAMPLERS = {"EulerDiscreteScheduler": "Euler", "EulerAncestralDiscreteScheduler": "Euler a", "DDIMScheduler": "DDIM"}

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA's file on this machine, and what the request says of it."""

    path: Path
    ref: LoraRef


@dataclass(frozen=True, slots=True)
class PreparedLoras:
    """The LoRAs of one job, checked and ready to be patched in, each with what its event will say."""

    loras: tuple[tuple[ParsedLora, AppliedLora], ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """A picture: uint8 [height, width, 3]. `seconds`: denoising and decoding."""

    pixels: Pixels
    seconds: float
    loras: tuple[AppliedLora, ...] = ()
    warnings: tuple[str, ...] = ()


class Engine(Protocol):
    """What a consumer needs of the GPU. `prepare` may run in one thread while `generate` runs in another."""

    @property
    def base_model(self) -> str: ...

    @property
    def gpu(self) -> str: ...

    @property
    def sampler(self) -> str: ...

    def prepare(self, files: Sequence[LoraFile]) -> PreparedLoras: ...

    def generate(self, request: GenerationRequest, loras: PreparedLoras, on_step: OnStep) -> GeneratedImage: ...

    def warm_up(self) -> None: ...


class StockEngine:
    """diffusers' own SDXL pipeline, with exact weights before every picture."""

    def __init__(self, pipeline: Any, base_model: str) -> None:
        self._pipeline = pipeline
        self._device = torch.device(pipeline.device)
        self._shapes = ModelShapes.of(pipeline)
        self._weights = PatchableWeights(pipeline)
        self._base_model = base_model

    @classmethod
    def load(
        cls, model: str, *, vae: str | None = None, device: str, dtype: str, hub_token: str | None = None
    ) -> Self:
        """Loads a diffusers folder or hub id, safetensors only; on a GPU its `fp16` variant where there is one.

        `dtype`: float16, bfloat16 or float32. Raises ModelBroken.
        """
        for logging in (diffusers_logging, transformers_logging):
            logging.set_verbosity_error()  # their warnings quote prompts
            logging.disable_progress_bar()
        try:
            pipeline = _load_pipeline(model, vae, torch.device(device), getattr(torch, dtype), hub_token)
            return cls(pipeline, Path(model).resolve().name if Path(model).exists() else model)
        except Exception as error:
            raise ModelBroken(f"The model cannot be loaded: {_describe(error)}") from error

    @property
    def base_model(self) -> str:
        """The hub id, or the folder's name."""
        return self._base_model

    @property
    def gpu(self) -> str:
        """The device's name, or `cpu`."""
        return torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else self._device.type

    @property
    def sampler(self) -> str:
        """The scheduler's usual name."""
        scheduler = type(self._pipeline.scheduler).__name__
        return _SAMPLERS.get(scheduler, scheduler)

    def prepare(self, files: Sequence[LoraFile]) -> PreparedLoras:
        """Reads and checks LoRA files; never touches the model.

        Raises LoraInvalid, and OSError where a file cannot be read.
        """
        loras, warnings = [], []
        for file in files:
            parsed = parse(file.path, self._shapes)
            if parsed.skipped:
                first = ", ".join(parsed.skipped[:3])
                warnings.append(f"{file.ref.name}: {len(parsed.skipped)} tensors match nothing in the model: {first}")
            applied = AppliedLora(
                name=file.ref.name,
                version=file.ref.version,
                scale=file.ref.scale,
                modules=len(parsed.deltas) if file.ref.scale else 0,
                skipped=len(parsed.skipped),
            )
            loras.append((parsed.pinned() if self._device.type == "cuda" else parsed, applied))
        return PreparedLoras(tuple(loras), tuple(warnings))

    def generate(self, request: GenerationRequest, loras: PreparedLoras, on_step: OnStep) -> GeneratedImage:
        """Draws one picture from the base weights and these LoRAs, whatever was drawn before.

        `on_step(step, total)` is called after each of the steps 1..total; what it raises passes through. Raises
        GenerationFailed (inference, a NaN or black image), GpuOutOfMemory, ModelBroken (the device is lost).
        """
        callback = _StepCallback(on_step)
        failure: WorkerError
        try:
            self._weights.patch([(parsed.deltas, applied.scale) for parsed, applied in loras.loras])
            pixels, seconds = self._draw(request, callback)
            warnings = (*self._cut_prompts(request), *loras.warnings)
            return GeneratedImage(pixels, seconds, tuple(applied for _, applied in loras.loras), warnings)
        except torch.OutOfMemoryError:
            failure = GpuOutOfMemory(f"The GPU has not enough memory for {request.width}x{request.height}.")
        except Exception as error:
            if error is callback.raised or isinstance(error, WorkerError):
                raise
            log.exception("inference_error")
            failure = GenerationFailed(f"Inference failed: {_describe(error)}")
        # Outside the handlers, whose tracebacks would keep the failed picture's memory.
        self._recover()
        raise failure

    def warm_up(self) -> None:
        """Draws a picture, so that the first job finds kernels and memory ready.

        Raises ModelBroken.
        """
        side = 1024 if self._device.type == "cuda" else 512
        request = GenerationRequest(job_id="warm-up", prompt="warm-up", width=side, height=side, steps=20)
        try:
            self.generate(request, PreparedLoras(), lambda step, total: None)
        except WorkerError as error:
            raise ModelBroken(f"The model cannot draw: {error}") from error

    @torch.no_grad()
    def _draw(self, request: GenerationRequest, callback: "_StepCallback") -> tuple[Pixels, float]:
        prompt, negative, pooled, negative_pooled = self._pipeline.encode_prompt(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt or None,
            do_classifier_free_guidance=request.cfg > 1.0,
            num_images_per_prompt=1,
            device=self._device,
        )
        self._synchronize()
        started = time.perf_counter()
        latents = self._pipeline(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            pooled_prompt_embeds=pooled,
            negative_pooled_prompt_embeds=negative_pooled,
            latents=self._noise(request),
            width=request.width,
            height=request.height,
            num_inference_steps=request.steps,
            guidance_scale=request.cfg,
            callback_on_step_end=callback,
            output_type="latent",
        ).images
        pixels = self._decode(latents)
        return pixels, time.perf_counter() - started

    def _noise(self, request: GenerationRequest) -> Tensor:
        factor = self._pipeline.vae_scale_factor
        channels = self._pipeline.unet.config.in_channels
        generator = torch.Generator("cpu").manual_seed(request.effective_seed)
        noise = torch.randn((1, channels, request.height // factor, request.width // factor), generator=generator)
        return noise.to(self._device, self._pipeline.unet.dtype)

    def _decode(self, latents: Tensor) -> Pixels:
        image = self._pipeline.vae.decode(_unscale(latents, self._pipeline.vae), return_dict=False)[0]
        if not torch.isfinite(image).all():
            raise GenerationFailed("The model drew a NaN image.")
        picture = self._pipeline.image_processor.postprocess(image, output_type="np")[0]
        pixels: Pixels = (picture * 255).round().astype(np.uint8)
        if not pixels.any():
            raise GenerationFailed("The model drew a black image.")
        return pixels

    def _cut_prompts(self, request: GenerationRequest) -> list[str]:
        warnings = []
        for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
            for tokenizer in (self._pipeline.tokenizer, self._pipeline.tokenizer_2):
                tokens, limit = len(tokenizer(text).input_ids), tokenizer.model_max_length
                if tokens > limit:
                    warnings.append(f"{name} has {tokens} tokens and was cut at {limit}")
                    break
        return warnings

    def _recover(self) -> None:
        try:
            self._weights.restore()
            self._synchronize()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        except Exception as error:
            raise ModelBroken(f"The device is lost: {_describe(error)}") from None

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@dataclass(slots=True)
class _StepCallback:
    """diffusers' callback around ours; remembers what ours raised."""

    on_step: OnStep
    raised: BaseException | None = field(default=None, init=False)

    def __call__(self, pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        try:
            self.on_step(index + 1, pipeline.num_timesteps)
        except BaseException as error:
            self.raised = error
            raise
        return {}


def _load_pipeline(model: str, vae: str | None, device: torch.device, dtype: torch.dtype, token: str | None) -> Any:
    options: dict[str, Any] = {"torch_dtype": dtype, "use_safetensors": True, "token": token}
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


def _unscale(latents: Tensor, vae: Any) -> Tensor:
    latents = latents.to(vae.dtype)
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or std is None:
        return latents / float(vae.config.scaling_factor)
    mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    unscaled: Tensor = latents * std / vae.config.scaling_factor + mean
    return unscaled


def _describe(error: Exception) -> str:
    text = _PATH.sub("[path]", redact_text(str(error)))
    return f"{type(error).__name__}: {text}"[:500]
