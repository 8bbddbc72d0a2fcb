"""What every engine does around a picture: exact weights before it, checks after it, and clear errors."""

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog
import torch
from torch import Tensor

from consumer import failpoints
from consumer.engine.common import current, describe
from consumer.engine.marks import Marks
from consumer.engine.preparing import prepare
from consumer.engine.protocol import GeneratedImage, LoraFile, OnStep, Pixels, PreparedLoras
from consumer.errors import GenerationFailed, GpuOutOfMemory, ModelBroken, WorkerError
from consumer.lora.weights import PatchableWeights
from schemas.lora.shapes import ModelShapes
from schemas.requests import GenerationRequest

log = structlog.get_logger(__name__)


class Painter(Protocol):
    """Draws with the weights as they are. `sampler`: the scheduler's usual name. `marks`: after each of its parts."""

    base_model: str
    device: torch.device
    marks: Marks
    shapes: ModelShapes
    weights: PatchableWeights

    @property
    def sampler(self) -> str: ...

    def draw(self, request: GenerationRequest, on_step: OnStep) -> Pixels:
        """One picture. What `on_step` raises passes through.

        Raises GenerationFailed for one that is NaN or black, and what torch raises.
        """
        ...

    def warm_up(self, request: GenerationRequest) -> None:
        """Makes ready what pictures like this one need. Raises as `draw` does."""
        ...

    def cut_prompts(self, request: GenerationRequest) -> list[str]:
        """A warning for each prompt that is longer than a text encoder reads."""
        ...

    def release(self) -> None:
        """Gives back what memory it can, after a failure."""
        ...


class PaintingEngine:
    """An `Engine` around a painter; `painter` is for tests and benchmarks to look at."""

    def __init__(self, painter: Painter) -> None:
        self.painter = painter
        self._painting = threading.Lock()

    @property
    def base_model(self) -> str:
        """The hub id, or the folder's name."""
        return self.painter.base_model

    @property
    def gpu(self) -> str:
        """The device's name, or `cpu`."""
        device = self.painter.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    @property
    def timings(self) -> dict[str, float]:
        """What the device did of the last picture, in seconds: `patch`, and the painter's own parts."""
        return {str(part): seconds for part, seconds in self.painter.marks.seconds().items()}

    def prepare(self, files: Sequence[LoraFile]) -> PreparedLoras:
        """Reads and checks LoRA files, and sends them to the device; never touches the model.

        Where there is no room for them it waits for the end of the picture that is being drawn, gives back what the
        painter can do without, and tries once more. Raises LoraInvalid, GpuOutOfMemory, ModelBroken (the device is
        lost), and OSError where a file cannot be read.
        """
        with current(self.painter.device):
            try:
                return prepare(files, self.painter.shapes, self.painter.weights)
            except GpuOutOfMemory as error:
                log.warning("lora.crowded_out", error=str(error))
            with self._painting:
                self._recover()
            return prepare(files, self.painter.shapes, self.painter.weights)

    def generate(self, request: GenerationRequest, loras: PreparedLoras, on_step: OnStep) -> GeneratedImage:
        """Draws one picture from the base weights and these LoRAs, whatever was drawn before.

        `on_step(step, total)` is called after each of the steps 1..total; what it raises passes through. Raises
        GenerationFailed (inference, a NaN or black image), WeightsChanged, GpuOutOfMemory, ModelBroken (the device is
        lost, or the pristine weights are).
        """
        with current(self.painter.device), self._painting:
            return self._generate(request, loras, _Steps(on_step, self.painter.weights.sample))

    def warm_up(self) -> None:
        """Makes ready what the first picture would otherwise wait for.

        Raises ModelBroken.
        """
        side = 1024 if self.painter.device.type == "cuda" else 512
        request = GenerationRequest(job_id="warm-up", prompt="warm-up", width=side, height=side)
        try:
            with current(self.painter.device):
                self.painter.warm_up(request)
        except Exception as error:
            raise ModelBroken(f"The model cannot draw: {describe(error)}") from error

    def _generate(self, request: GenerationRequest, loras: PreparedLoras, steps: "_Steps") -> GeneratedImage:
        failure: WorkerError
        try:
            return self._paint(request, loras, steps)
        except torch.OutOfMemoryError:
            failure = GpuOutOfMemory(f"The GPU has not enough memory for {request.width}x{request.height}.")
        except Exception as error:
            if error is steps.raised or isinstance(error, WorkerError):
                raise
            # As text: a renderer with local variables would show the prompt.
            log.error("inference_error", traceback=traceback.format_exc())
            failure = GenerationFailed(f"Inference failed: {describe(error)}")
        # Outside the handlers, whose tracebacks would keep the failed picture's memory.
        self._recover()
        raise failure

    def _paint(self, request: GenerationRequest, loras: PreparedLoras, steps: "_Steps") -> GeneratedImage:
        weights, marks = self.painter.weights, self.painter.marks
        marks.begin()
        with failpoints.around("patch"):
            if loras.patch is None:
                weights.restore()
            else:
                weights.patch(loras.patch)
        marks.set("patch")
        cut = self.painter.cut_prompts(request)  # while the device patches
        started = time.perf_counter()
        pixels = self.painter.draw(request, steps)
        seconds = time.perf_counter() - started
        weights.check(steps.sample)
        return GeneratedImage(
            pixels,
            seconds,
            loras=loras.applied,
            warnings=(*cut, *loras.warnings),
            sampler=self.painter.sampler,
        )

    def _recover(self) -> None:
        device = self.painter.device
        try:
            self.painter.weights.restore()
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # graphs may be running
            self.painter.release()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        except Exception as error:
            raise ModelBroken(f"The device is lost: {describe(error)}") from None


@dataclass(slots=True)
class _Steps:
    """A step callback that remembers what it raised, and takes a sample of the weights when the last step is done.

    A painter that works ahead has still to decode then: the sample waits behind that, and the device never for it.
    """

    on_step: OnStep
    take_sample: Callable[[], Tensor]
    raised: BaseException | None = field(default=None, init=False)
    sample: Tensor = field(init=False)

    def __call__(self, step: int, total: int) -> None:
        try:
            self.on_step(step, total)
        except BaseException as error:
            self.raised = error
            raise
        if step == total:
            self.sample = self.take_sample()
