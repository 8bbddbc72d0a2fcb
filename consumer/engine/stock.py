"""The stock diffusers pipeline, with one job's LoRAs patched into its weights: the oracle, and the CPU's engine."""

import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import structlog
import torch

from consumer import failpoints
from consumer.engine.protocol import GeneratedImage, LoraFile, OnStep, Pixels, PreparedLoras
from consumer.errors import GenerationFailed, GpuOutOfMemory, ModelBroken, WorkerError
from consumer.lora.deltas import ParsedLora
from consumer.lora.formats import parse
from consumer.lora.shapes import model_shapes
from consumer.lora.weights import PatchableWeights
from consumer.pipeline import cut_prompts, decode, describe, load_pipeline, noise, sampler_name, seeded
from schemas.events import AppliedLora
from schemas.requests import GenerationRequest

log = structlog.get_logger(__name__)


class StockEngine:
    """diffusers' own SDXL pipeline, with exact weights before every picture."""

    def __init__(self, pipeline: Any, base_model: str) -> None:
        self._pipeline = pipeline
        self._device = torch.device(pipeline.device)
        self._shapes = model_shapes(pipeline)
        self._weights = PatchableWeights(pipeline)
        self._base_model = base_model

    @classmethod
    def load(cls, model: str, *, vae: str | None = None, device: str, dtype: str, hub_token: str | None = None) -> Self:
        """Loads a diffusers folder or hub id, safetensors only; on a GPU its `fp16` variant where there is one.

        `dtype`: float16, bfloat16 or float32. Raises ModelBroken.
        """
        try:
            pipeline = load_pipeline(model, vae, torch.device(device), getattr(torch, dtype), hub_token)
            return cls(pipeline, Path(model).resolve().name if Path(model).exists() else model)
        except Exception as error:
            raise ModelBroken(f"The model cannot be loaded: {describe(error)}") from error

    @property
    def base_model(self) -> str:
        """The hub id, or the folder's name."""
        return self._base_model

    @property
    def gpu(self) -> str:
        """The device's name, or `cpu`."""
        return torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else self._device.type

    def prepare(self, files: Sequence[LoraFile]) -> PreparedLoras:
        """Reads and checks LoRA files; never touches the model.

        Raises LoraInvalid, ModelBroken (the device is lost), and OSError where a file cannot be read.
        """
        loras, warnings = [], []
        for file in files:
            parsed = self._read(file)
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
            loras.append((parsed, applied))
        return PreparedLoras(tuple(loras), tuple(warnings))

    def _read(self, file: LoraFile) -> ParsedLora:
        try:
            parsed = parse(file.path, self._shapes)
            return parsed.pinned() if self._device.type == "cuda" else parsed
        except torch.AcceleratorError as error:  # memory is pinned by the driver, which answers nothing after a fault
            raise ModelBroken(f"The device is lost: {describe(error)}") from None

    def generate(self, request: GenerationRequest, loras: PreparedLoras, on_step: OnStep) -> GeneratedImage:
        """Draws one picture from the base weights and these LoRAs, whatever was drawn before.

        `on_step(step, total)` is called after each of the steps 1..total; what it raises passes through. Raises
        GenerationFailed (inference, a NaN or black image), GpuOutOfMemory, ModelBroken (the device is lost).
        """
        callback = _StepCallback(on_step)
        failure: WorkerError
        try:
            with failpoints.around("patch"):
                self._weights.patch([(parsed.deltas, applied.scale) for parsed, applied in loras.loras])
            pixels, seconds = self._draw(request, callback)
            return GeneratedImage(
                pixels,
                seconds,
                loras=tuple(applied for _, applied in loras.loras),
                warnings=(*cut_prompts(self._pipeline, request), *loras.warnings),
                sampler=sampler_name(self._pipeline),
            )
        except torch.OutOfMemoryError:
            failure = GpuOutOfMemory(f"The GPU has not enough memory for {request.width}x{request.height}.")
        except Exception as error:
            if error is callback.raised or isinstance(error, WorkerError):
                raise
            # As text: a renderer with local variables would show the prompt.
            log.error("inference_error", traceback=traceback.format_exc())
            failure = GenerationFailed(f"Inference failed: {describe(error)}")
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
        generator = seeded(request)
        self._synchronize()
        started = time.perf_counter()
        latents = self._pipeline(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            pooled_prompt_embeds=pooled,
            negative_pooled_prompt_embeds=negative_pooled,
            latents=noise(self._pipeline, request, generator),
            generator=generator,  # for schedulers that draw more noise at every step
            width=request.width,
            height=request.height,
            num_inference_steps=request.steps,
            guidance_scale=request.cfg,
            callback_on_step_end=callback,
            output_type="latent",
        ).images
        pixels = decode(self._pipeline, latents)
        return pixels, time.perf_counter() - started

    def _recover(self) -> None:
        try:
            self._weights.restore()
            self._synchronize()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        except Exception as error:
            raise ModelBroken(f"The device is lost: {describe(error)}") from None

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
