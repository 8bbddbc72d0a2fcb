"""One job's way through this consumer: prepare, generate, deliver.

The stages of different jobs overlap: while one denoises, the next one's LoRA is fetched and the last one's PNG is
uploaded. Only `generate` needs the GPU, and only one job has it at a time.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Protocol

import structlog

from consumer import failpoints
from consumer.attempt import Attempt
from consumer.engine import Engine, GeneratedImage, LoraFile, OnStep, PreparedLoras
from consumer.errors import HandedBack, ModelBroken
from consumer.gpu import Drawn, GpuThread
from consumer.health import Health
from consumer.images import encode_png
from consumer.keeper import heed
from consumer.outage import until_answered
from consumer.progress import ProgressWriter
from consumer.queue import Leases
from consumer.storage import StoredArtifact
from schemas import events
from schemas.events import GenerationMetadata, ModelInfo, StartedData, SucceededData, Timings
from schemas.requests import GenerationRequest, LoraRef

_LOOKS = 20  # at a picture that comes no step further

log = structlog.get_logger(__name__)


class Fetcher(Protocol):
    """Brings a LoRA's file onto this machine; it stays readable inside the context."""

    def fetch(self, ref: LoraRef) -> AbstractAsyncContextManager[Path]: ...


class Sink(Protocol):
    """Where pictures go; `consumer.artifacts.Artifacts` says what each method does."""

    def check(self, attempt: Attempt) -> None: ...

    def address(self, request: GenerationRequest) -> tuple[str | None, str | None]: ...

    async def store(self, attempt: Attempt, png: bytes) -> StoredArtifact: ...


@dataclass(frozen=True, slots=True)
class Generated:
    """What leaves the GPU, with the seconds that it took: `prepare_s` before, `gpu_s` on it."""

    image: GeneratedImage
    prepare_s: float
    queued_s: float
    gpu_s: float


class Stages:
    """The stages of every job of one consumer, around its one GPU; none is drawn once its `health` is broken.

    `stall_s`: for how long a picture may come no step further.
    """

    def __init__(
        self, engine: Engine, fetcher: Fetcher, artifacts: Sink, leases: Leases, consumer: str, *, stall_s: float = 60.0
    ) -> None:
        self.health = Health()
        self._engine = engine
        self._fetcher = fetcher
        self._artifacts = artifacts
        self._leases = leases
        self._consumer = consumer
        self._stall_s = stall_s
        self._gpu = asyncio.Lock()
        self._gpu_thread = GpuThread()

    async def generate(self, attempt: Attempt) -> Generated:
        """Prepares the job, waits for the GPU, and draws.

        Raises a WorkerError, or whatever the attempt was stopped with.
        """
        async with AsyncExitStack() as files:
            with attempt.working(), self.health.watching(attempt.lease.job_id):
                loras = await attempt.guard(self._prepare(attempt, files))
            prepare_s, ready_at = attempt.worked_s, self._gpu_thread.ready()
            async with AsyncExitStack() as behind, self._holding_gpu(attempt):
                queued_s = attempt.waited_before_begin_s + attempt.since_begin_s - prepare_s
                progress = ProgressWriter(attempt, self._leases)
                written = asyncio.gather(self._publish_started(attempt, queued_s), progress.write())
                # awaited while the next job has the GPU, and before this run can end
                behind.push_async_callback(progress.end, written)
                with attempt.working():
                    drawn = await self._draw(attempt, loras, progress, ready_at)
            if drawn.waited is not None:
                gap_ms, handover_ms = (round(1000 * s, 3) for s in (drawn.waited.gap_s, drawn.waited.handover_s))
                log.info("gpu.waited", ms=gap_ms, handover_ms=handover_ms)
            return Generated(drawn.image, prepare_s, queued_s, gpu_s=attempt.worked_s - prepare_s)

    @asynccontextmanager
    async def _holding_gpu(self, attempt: Attempt) -> AsyncIterator[None]:
        """Waits for the GPU, and looks once more whether the job may have it."""
        await attempt.guard(self._gpu.acquire())
        try:
            if self.health.broken is not None:
                raise HandedBack
            attempt.check()
            self._artifacts.check(attempt)  # the upload URL may have expired behind another job
            attempt.stage = "running"
            with self.health.watching(attempt.lease.job_id):  # which knows before the next job gets the GPU
                yield
            self.health.drew()
        finally:
            self._gpu.release()

    async def deliver(self, attempt: Attempt, generated: Generated) -> SucceededData:
        """Encodes and stores the picture, and says what there is to say of it."""
        attempt.stage = "delivering"
        image, request = generated.image, attempt.request
        model_info = _model_info(self._engine.base_model, attempt, image)
        with attempt.working():
            started = time.perf_counter()
            encode = asyncio.to_thread(encode_png, image.pixels, request, model_info, sampler=image.sampler)
            with failpoints.around("encode"):
                png = await attempt.guard(encode)
            encoded = time.perf_counter()
            with failpoints.around("upload"):
                stored = await attempt.guard(self._artifacts.store(attempt, png))
            uploaded = time.perf_counter()
        timings = Timings(
            queued=round(generated.queued_s, 4),
            prepare=round(generated.prepare_s, 4),
            generate=round(generated.gpu_s, 4),
            encode=round(encoded - started, 4),
            upload=round(uploaded - encoded, 4),
            total=round(attempt.waited_before_begin_s + attempt.since_begin_s, 4),
        )
        return self._succeeded(attempt, generated, model_info, stored, timings)

    async def _prepare(self, attempt: Attempt, files: AsyncExitStack) -> PreparedLoras:
        self._artifacts.check(attempt)
        with failpoints.around("download"):
            loras = [
                LoraFile(await files.enter_async_context(self._fetcher.fetch(ref)), ref)
                for ref in attempt.request.lora_refs
            ]
        with failpoints.around("prepare"):
            return await asyncio.to_thread(self._engine.prepare, loras)

    async def _draw(
        self, attempt: Attempt, loras: PreparedLoras, progress: ProgressWriter, ready_at: float
    ) -> Drawn[GeneratedImage]:
        loop = asyncio.get_running_loop()

        def on_step(step: int, total: int) -> None:
            loop.call_soon_threadsafe(progress.note, step, total)
            attempt.check()

        # Never cancelled from outside, since a thread cannot be: the step callback ends it.
        generate = partial(self._generate, attempt.request, loras, on_step)
        drawing = self._gpu_thread.draw(generate, ready_at=ready_at)
        if not await self._comes_on(drawing, progress):
            drawing.add_done_callback(_ignore)
            raise ModelBroken(f"the picture came no step further within {self._stall_s:g} s")
        return drawing.result()

    async def _comes_on(self, drawing: asyncio.Future[Drawn[GeneratedImage]], progress: ProgressWriter) -> bool:
        """Waits until the picture is drawn; False if no step has come within `stall_s`.

        Looks are counted, not time: a process that was frozen has not waited for anything.
        """
        step, looks_left = -1, _LOOKS
        while not drawing.done() and looks_left:
            await asyncio.wait({drawing}, timeout=self._stall_s / _LOOKS)
            step, looks_left = (step, looks_left - 1) if progress.step == step else (progress.step, _LOOKS)
        return drawing.done()

    def _generate(self, request: GenerationRequest, loras: PreparedLoras, on_step: OnStep) -> GeneratedImage:
        with failpoints.around("generate"):
            return self._engine.generate(request, loras, on_step)

    async def _publish_started(self, attempt: Attempt, queued_s: float) -> None:
        data = StartedData(
            job_id=attempt.lease.job_id,
            run=attempt.run,
            attempt=attempt.begun.attempt,
            consumer=self._consumer,
            request_metadata=attempt.request.metadata,
            queued=round(queued_s, 4),
        )
        event = events.started(data, datetime.now(UTC))
        heed(attempt, await until_answered(lambda: self._leases.start(attempt.lease, event), what="start"))

    def _succeeded(
        self,
        attempt: Attempt,
        generated: Generated,
        model_info: ModelInfo,
        stored: StoredArtifact,
        timings: Timings,
    ) -> SucceededData:
        request = attempt.request
        image_url, image_key = self._artifacts.address(request)
        height, width, _ = generated.image.pixels.shape
        return SucceededData(
            job_id=request.job_id,
            run=attempt.run,
            attempt=attempt.begun.attempt,
            consumer=self._consumer,
            request_metadata=request.metadata,
            image_url=image_url,
            image_key=image_key,
            image_sha256=stored.sha256,
            image_bytes=stored.size,
            image_size=(width, height),
            generation_time_seconds=round(generated.image.seconds, 4),
            model_info=model_info,
            metadata=GenerationMetadata(seed_used=stored.seed, actual_steps=request.steps, actual_cfg=request.cfg),
            timings=timings,
            gpu=self._engine.gpu,
            gpu_seconds=round(generated.gpu_s, 4),
            warnings=generated.image.warnings,
        )


def _ignore(drawing: "asyncio.Future[Drawn[GeneratedImage]]") -> None:
    """Takes what a picture that was given up comes to in the end, so that nobody misses it."""
    if not drawing.cancelled():
        drawing.exception()


def _model_info(base_model: str, attempt: Attempt, image: GeneratedImage) -> ModelInfo:
    refs = attempt.request.lora_refs
    single = refs[0] if len(refs) == 1 else None
    return ModelInfo(
        base_model=base_model,
        lora_applied=any(lora.modules for lora in image.loras),
        lora_version=single.version if single else None,
        lora_scale=single.scale if single else None,
        loras=image.loras,
    )
