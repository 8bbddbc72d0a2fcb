"""The stock diffusers pipeline, with one job's LoRAs patched into its weights: the oracle, and the CPU's engine."""

from typing import Any, Self

import torch

from consumer.engine.common import base_model_name, describe, seeded
from consumer.engine.marks import Marks
from consumer.engine.painting import PaintingEngine
from consumer.engine.protocol import OnStep, Pixels
from consumer.errors import ModelBroken
from consumer.lora.shapes import lora_parameters, model_shapes
from consumer.lora.weights import PatchableWeights
from consumer.pipeline import cut_prompts, decode, load_pipeline, noise, sampler_name
from schemas.requests import GenerationRequest


class StockPainter:
    """Draws by diffusers' own pipeline, as it is."""

    def __init__(self, pipeline: Any, base_model: str) -> None:
        self.base_model = base_model
        self.device = torch.device(pipeline.device)
        self.marks = Marks(self.device)
        self.shapes = model_shapes(pipeline)
        self.weights = adopt(pipeline)
        self.pipeline = pipeline

    @property
    def sampler(self) -> str:
        return sampler_name(self.pipeline)

    @torch.no_grad()
    def draw(self, request: GenerationRequest, on_step: OnStep) -> Pixels:
        """One picture, uint8 [height, width, 3]. What `on_step` raises passes through.

        Raises GenerationFailed for one that is NaN or black, and what torch and diffusers raise.
        """
        prompt, negative, pooled, negative_pooled = self.pipeline.encode_prompt(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt or None,
            do_classifier_free_guidance=request.cfg > 1.0,
            num_images_per_prompt=1,
            device=self.device,
        )
        self.marks.set("text")

        def callback(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(index + 1, pipeline.num_timesteps)
            return {}

        generator = seeded(request)
        latents = self.pipeline(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            pooled_prompt_embeds=pooled,
            negative_pooled_prompt_embeds=negative_pooled,
            latents=noise(self.pipeline, request, generator),
            generator=generator,  # for schedulers that draw more noise at every step
            width=request.width,
            height=request.height,
            num_inference_steps=request.steps,
            guidance_scale=request.cfg,
            callback_on_step_end=callback,
            output_type="latent",
        ).images
        self.marks.set("denoise")
        pixels = decode(self.pipeline, latents)
        self.marks.set("decode")
        return pixels

    def warm_up(self, request: GenerationRequest) -> None:
        """Draws a picture like this one for a step or two."""
        self.draw(request.model_copy(update={"steps": 2}), lambda step, total: None)

    def cut_prompts(self, request: GenerationRequest) -> list[str]:
        return cut_prompts(self.pipeline, request)

    def release(self) -> None:
        """What a picture needed is let go with it."""


class StockEngine(PaintingEngine):
    """diffusers' own SDXL pipeline, with exact weights before every picture."""

    painter: StockPainter

    def __init__(self, pipeline: Any, base_model: str) -> None:
        super().__init__(StockPainter(pipeline, base_model))

    @classmethod
    def load(cls, model: str, *, vae: str | None = None, device: str, dtype: str, hub_token: str | None = None) -> Self:
        """Loads a diffusers folder or hub id, safetensors only; on a GPU its `fp16` variant where there is one.

        `dtype`: float16, bfloat16 or float32. Raises ModelBroken.
        """
        try:
            pipeline = load_pipeline(model, vae, torch.device(device), getattr(torch, dtype), hub_token)
            return cls(pipeline, base_model_name(model))
        except Exception as error:
            raise ModelBroken(f"The model cannot be loaded: {describe(error)}") from error


def adopt(pipeline: Any) -> PatchableWeights:
    """Patchable weights in the place of the pipeline's own."""
    parameters = dict(lora_parameters(pipeline))
    weights = PatchableWeights(parameters)
    for name, parameter in parameters.items():
        parameter.data = weights[name]
    return weights
