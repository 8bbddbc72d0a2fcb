"""Stock diffusers: as people use it, well set up, and compiled."""

import io
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.usual import stock_pipeline, variant
from benchmarks.workload import SCALE, Laps, Workload
from consumer.engine import Pixels

_ADAPTER = "bench"
_COMPILED: dict[str, Any] = {"mode": "reduce-overhead", "fullgraph": True}  # launched as CUDA graphs
_HALF = (torch.float16, torch.bfloat16)
_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class AsPeopleUseIt:
    """Load, fuse, draw, unfuse and unload, each time; a float16 VAE is upcast to float32 by the pipeline."""

    _loading: ClassVar[dict[str, Any]] = {}

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._laps = Laps(workload.device)
        self.pipeline = self._load()
        self.pixels: Pixels = np.zeros((0, 0, 3), np.uint8)
        self._time_the_text()

    def draw(self, number: int) -> dict[str, float]:
        """Draws one picture; seconds by part."""
        pipeline = self.pipeline
        self._laps = laps = Laps(self._workload.device)
        pipeline.load_lora_weights(self._workload.loras[number], adapter_name=_ADAPTER, **self._loading)
        laps.end("load")
        pipeline.fuse_lora(lora_scale=SCALE)
        laps.end("fuse")
        self._picture(number)
        pipeline.unfuse_lora()
        laps.end("unfuse")
        pipeline.unload_lora_weights()
        laps.end("unload")
        return laps.seconds

    def _load(self) -> Any:
        work = self._workload
        return stock_pipeline(work.model, work.device, work.dtype, **self._parts())

    def _parts(self) -> dict[str, Any]:
        return {}

    def _attention(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def _picture(self, number: int) -> None:
        request = self._workload.request(number)
        self._laps.end("set-up")
        with self._attention():
            image = self.pipeline(
                request.prompt,
                negative_prompt=request.negative_prompt,
                width=request.width,
                height=request.height,
                num_inference_steps=request.steps,
                guidance_scale=request.cfg,
                generator=torch.Generator("cpu").manual_seed(request.effective_seed),
                callback_on_step_end=self._on_step,
            ).images[0]
        self._laps.end("decode")
        self.pixels = np.asarray(image)
        image.save(io.BytesIO(), "PNG")
        self._laps.end("png")

    def _on_step(self, pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index + 1 == pipeline.num_timesteps:
            self._laps.end("denoise")
        return {}

    def _time_the_text(self) -> None:
        encode = self.pipeline.encode_prompt

        def timed(*inputs: Any, **options: Any) -> Any:
            encoded = encode(*inputs, **options)
            self._laps.end("text")
            return encoded

        self.pipeline.encode_prompt = timed


class WellSetUp(AsPeopleUseIt):
    """The same with what its documentation advises: bfloat16 VAE, channels_last, cuDNN's attention, quick loading."""

    _loading: ClassVar[dict[str, Any]] = {"low_cpu_mem_usage": True}

    def _load(self) -> Any:
        pipeline = super()._load()
        for model in (pipeline.unet, pipeline.vae):
            model.to(memory_format=torch.channels_last)
        decode = pipeline.vae.decode
        # the pipeline hands its own dtype over, and casts for no VAE but a float16 one
        pipeline.vae.decode = lambda latents, **options: decode(latents.to(pipeline.vae.dtype), **options)
        return pipeline

    def _parts(self) -> dict[str, Any]:
        work = self._workload
        if getattr(torch, work.dtype) not in _HALF:
            return {}
        vae = AutoencoderKL.from_pretrained(
            work.model, subfolder="vae", variant=variant(work.model), torch_dtype=torch.bfloat16
        )
        return {"vae": vae}

    def _attention(self) -> AbstractContextManager[Any]:
        if torch.device(self._workload.device).type != "cuda":
            return nullcontext()
        attention: AbstractContextManager[Any] = sdpa_kernel(_BACKENDS, set_priority=True)
        return attention


class Compiled(WellSetUp):
    """The well set up one compiled, and without any LoRA: what the next one could reach if LoRAs cost nothing."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self._compile()

    def draw(self, number: int) -> dict[str, float]:
        """Draws one picture of the base model; seconds by part."""
        self._laps = Laps(self._workload.device)
        self._picture(number)
        return self._laps.seconds

    def _compile(self) -> None:
        torch.compiler.reset()
        self.pipeline.unet.compile(**_COMPILED)
        self.pipeline.vae.decode = torch.compile(self.pipeline.vae.decode, **_COMPILED)


class HotSwapped(Compiled):
    """Compiled, each LoRA swapped in for the one before: beside the weights, not fused into them."""

    def __init__(self, workload: Workload) -> None:
        self._swaps = False
        super().__init__(workload)

    def draw(self, number: int) -> dict[str, float]:
        """Draws one picture; seconds by part."""
        self._laps = Laps(self._workload.device)
        self._swap(number)
        self._laps.end("load")
        self._picture(number)
        return self._laps.seconds

    def _compile(self) -> None:
        # the first adapter's layers must be there when the graph is made
        self.pipeline.enable_lora_hotswap(target_rank=self._workload.rank)
        self._swap(0)
        super()._compile()

    def _swap(self, number: int) -> None:
        self.pipeline.load_lora_weights(
            self._workload.loras[number], adapter_name=_ADAPTER, hotswap=self._swaps, **self._loading
        )
        self.pipeline.set_adapters(_ADAPTER, adapter_weights=SCALE)  # a swap forgets it
        self._swaps = True
