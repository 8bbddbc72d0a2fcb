"""Hand-written stand-ins for the GPU and the storage, where neither is what a test is about."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np

from consumer.attempt import Attempt
from consumer.engine import GeneratedImage, LoraFile, PreparedLoras
from consumer.errors import UploadRefused
from consumer.storage import StoredArtifact
from schemas.requests import GenerationRequest, LoraRef


class FakeEngine:
    """Draws a grey square in `steps` steps of `step_s`; notes what it did, in order."""

    base_model = "fake"
    gpu = "fake"

    def __init__(self, step_s: float = 0.0) -> None:
        self.step_s = step_s
        self.log: list[str] = []
        self.fail_with: list[Exception] = []
        self.drawing = threading.Event()

    def prepare(self, files: Sequence[LoraFile]) -> PreparedLoras:
        self.log.append("prepare")
        return PreparedLoras()

    def generate(
        self, request: GenerationRequest, loras: PreparedLoras, on_step: Callable[[int, int], None]
    ) -> GeneratedImage:
        self.log.append(f"draw {request.job_id}")
        self.drawing.set()
        try:
            if self.fail_with:
                raise self.fail_with.pop(0)
            for step in range(1, request.steps + 1):
                time.sleep(self.step_s)
                on_step(step, request.steps)
        finally:
            self.drawing.clear()
        self.log.append(f"drawn {request.job_id}")
        return GeneratedImage(np.full((8, 8, 3), 128, np.uint8), seconds=request.steps * self.step_s)

    def warm_up(self) -> None:
        self.log.append("warm up")


class FakeFetcher:
    """Takes `fetch_s` for any LoRA, and longer while `until` says no."""

    def __init__(self, fetch_s: float = 0.0) -> None:
        self.fetch_s = fetch_s
        self.until: Callable[[], bool] = lambda: True
        self.log: list[str] = []
        self.fail_with: list[Exception] = []

    @asynccontextmanager
    async def fetch(self, ref: LoraRef) -> AsyncIterator[Path]:
        self.log.append(f"fetch {ref.name}")
        await asyncio.sleep(self.fetch_s)
        while not self.until():
            await asyncio.sleep(0.005)
        if self.fail_with:
            raise self.fail_with.pop(0)
        yield Path(ref.name)


class FakeArtifacts:
    """Takes `store_s` for any picture, and forgets it."""

    def __init__(self, store_s: float = 0.0) -> None:
        self.store_s = store_s
        self.refuse_at_check: int | None = None
        self.log: list[str] = []
        self.fail_with: list[Exception] = []

    def check(self, attempt: Attempt) -> None:
        self.log.append("check")
        if self.log.count("check") == self.refuse_at_check:
            raise UploadRefused("the upload URL has expired", retry_after_s=0)

    def address(self, request: GenerationRequest) -> tuple[str | None, str | None]:
        return None, request.image_key

    async def store(self, attempt: Attempt, png: bytes) -> StoredArtifact:
        self.log.append(f"store {attempt.request.job_id}")
        await asyncio.sleep(self.store_s)
        if self.fail_with:
            raise self.fail_with.pop(0)
        self.log.append(f"stored {attempt.request.job_id}")
        return StoredArtifact("0" * 64, len(png), attempt.request.effective_seed, adopted=False)
