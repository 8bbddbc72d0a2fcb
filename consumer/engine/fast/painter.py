"""SDXL in plain functions over patchable weights, each step a CUDA graph."""

from collections.abc import Mapping
from functools import cached_property, partial
from typing import Self

import structlog
import torch
from torch import Tensor

from consumer.engine.common import base_model_name, cut_prompts, noise, refuse_black, refuse_nan, seeded
from consumer.engine.fast.canvas import Canvas
from consumer.engine.fast.capture import Pool
from consumer.engine.fast.checkpoint import Checkpoint, load_checkpoint
from consumer.engine.fast.decoder import Decoder
from consumer.engine.fast.fields import UnknownModel
from consumer.engine.fast.layout import EMBEDDINGS
from consumer.engine.fast.ops import Ops, TorchOps
from consumer.engine.fast.prompts import Prompts
from consumer.engine.fast.schedule import euler_schedule
from consumer.engine.fast.text import conditions, token_ids
from consumer.engine.fast.unet import UNet
from consumer.engine.marks import Marks
from consumer.engine.protocol import OnStep, Pixels
from consumer.lora.weights import PatchableWeights
from consumer.triton_support import why_no_triton
from schemas.requests import GenerationRequest

log = structlog.get_logger(__name__)


class FastPainter:
    """Draws by Triton kernels and CUDA graphs on a GPU, and by the same functions in plain torch on a CPU."""

    sampler = "Euler"

    def __init__(self, checkpoint: Checkpoint, base_model: str, device: torch.device) -> None:
        self.base_model = base_model
        self.device = device
        self.shapes = checkpoint.shapes()
        self.weights, live = _patchable(checkpoint.parameters)
        self._vae = {name: tensor for name, tensor in checkpoint.parameters.items() if name.startswith("vae.")}
        self._vae_config = checkpoint.vae
        self._scheduler = checkpoint.scheduler
        self._tokenizers = checkpoint.tokenizers
        self._zeros = checkpoint.zeros
        self._encode = partial(conditions, live, checkpoint.text_encoders)
        self._ops = _ops(device)
        self._unet = UNet(live, self.weights, checkpoint.unet, self._ops)
        self._decoder = Decoder(self._vae, checkpoint.vae, self._ops, self._unet.dtype)
        self.marks = Marks(device)
        self._steps = Marks(device)
        self._pool = _new_pool(device)
        self._prompts: dict[int, Prompts] = {}
        self._canvases: dict[tuple[int, int, int], Canvas] = {}

    @classmethod
    def load(cls, model: str, *, vae: str | None = None, device: str, dtype: str, hub_token: str | None = None) -> Self:
        """Loads a diffusers folder or hub id, safetensors only; on a GPU its `fp16` variant where there is one.

        `dtype`: float16, bfloat16 or float32. Raises UnknownModel where this engine cannot draw what the stock one
        would, and whatever the hub's client or the device raise.
        """
        place = torch.device(device)
        if place.type == "cuda" and (reason := why_no_triton()):
            raise UnknownModel(reason)
        if place.type == "cuda" and dtype == "float32":
            raise UnknownModel("it draws in half precision only")
        checkpoint = load_checkpoint(model, vae=vae, device=place, dtype=getattr(torch, dtype), token=hub_token)
        return cls(checkpoint, base_model_name(model), place)

    def draw(self, request: GenerationRequest, on_step: OnStep) -> Pixels:
        """One picture, uint8 [height, width, 3]; what `on_step` raises passes through, a step later than it might.

        Raises GenerationFailed for one that is NaN or black, and what torch raises.
        """
        self._unet.layers.refresh(self.weights.touched)
        self.weights.settle()
        canvas, prompts = self._canvas(request)
        schedule = euler_schedule(self._scheduler, request.steps)
        texts, present = self._texts(request)
        ids = token_ids(self._tokenizers, texts)
        size = (request.height, request.width)
        prompts.tell(ids, present, size=size, schedule=schedule, guidance=request.cfg)
        self.marks.set("text")
        channels, factor = self._vae_config.latent_channels, self._vae_config.factor
        canvas.begin(noise(request, seeded(request), channels, factor).numpy())
        self._denoise(canvas, request.steps, on_step)
        return self._picture(canvas)

    def warm_up(self, request: GenerationRequest) -> None:
        """Makes kernels ready for pictures like this one, which is drawn for a single step."""
        canvas, _ = self._canvas(request)
        if self.device.type == "cuda":
            with torch.no_grad(), self._ops.compiling():
                canvas.run_once()
        self.draw(request.model_copy(update={"steps": 1}), lambda step, total: None)

    def cut_prompts(self, request: GenerationRequest) -> list[str]:
        return cut_prompts(request, [(tokenizer.count, tokenizer.limit) for tokenizer in self._tokenizers])

    def release(self) -> None:
        # the memory of a pool is free only when the last of its graphs is gone, and then the pool is done with
        self._canvases.clear()
        self._prompts.clear()
        self._pool = _new_pool(self.device)

    def _denoise(self, canvas: Canvas, steps: int, on_step: OnStep) -> None:
        # The GPU is always one step ahead of what has been looked at, so that it never waits for a look.
        for step in range(1, steps + 1):
            canvas.step()
            self._steps.set(step)
            if step > 1:
                self._steps.wait(step - 1)
                on_step(step - 1, steps)
        self.marks.set("denoise")
        canvas.decode()
        self.marks.set("decode")
        self._steps.wait(steps)
        on_step(steps, steps)

    def _picture(self, canvas: Canvas) -> Pixels:
        pixels, is_finite = canvas.download()
        if not is_finite and canvas.has_finite_latents():
            log.warning("vae.overflow", dtype=str(self._decoder.dtype))
            canvas.decode_by(self._exact_decoder)  # this one alone: no picture depends on the ones before
            pixels, is_finite = canvas.download()
        refuse_nan(is_finite)
        refuse_black(pixels)
        return pixels

    @cached_property
    def _exact_decoder(self) -> Decoder:
        """In float32, as the stock pipeline decodes wherever the VAE's configuration says that float16 overflows."""
        return Decoder(self._vae, self._vae_config, self._ops, torch.float32)

    def _texts(self, request: GenerationRequest) -> tuple[list[str], list[bool]]:
        """The prompts of a picture's batch, and which of them are not to be encoded as zeros."""
        if request.cfg <= 1.0:
            return [request.prompt], [True]
        present = bool(request.negative_prompt) or not self._zeros
        return [request.negative_prompt, request.prompt], [present, True]

    def _canvas(self, request: GenerationRequest) -> tuple[Canvas, Prompts]:
        batch = 2 if request.cfg > 1.0 else 1
        if batch not in self._prompts:
            self._prompts[batch] = Prompts(batch, self._unet, self._encode, self.device, self._pool)
        prompts = self._prompts[batch]
        key = (request.height, request.width, batch)
        if key not in self._canvases:
            self._canvases[key] = Canvas(
                request.height, request.width, self._unet, self._decoder, prompts, self._ops, self._pool
            )
        return self._canvases[key], prompts


def _patchable(parameters: Mapping[str, Tensor]) -> tuple[PatchableWeights, dict[str, Tensor]]:
    """The weights that a LoRA may change; and all parameters but the autoencoder's as they live."""
    drawn = {name: tensor for name, tensor in parameters.items() if not name.startswith("vae.")}
    fixed = {name: tensor.clone() for name, tensor in drawn.items() if name.endswith(EMBEDDINGS)}
    weights = PatchableWeights({name: drawn[name] for name in drawn if name not in fixed}, channels_last=True)
    return weights, {name: fixed[name] if name in fixed else weights[name] for name in drawn}


def _new_pool(device: torch.device) -> Pool | None:
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def _ops(device: torch.device) -> Ops:
    if device.type != "cuda":
        return TorchOps()
    from consumer.engine.fast.triton_ops import TritonOps

    # GPUs for desktops have descriptors from 12 on, but not the shared memory that the tiles take
    gpu = torch.cuda.get_device_properties(device)
    return TritonOps(has_descriptors=gpu.major in (9, 10), multiprocessors=gpu.multi_processor_count)
