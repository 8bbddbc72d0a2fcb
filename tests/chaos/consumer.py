"""`python -m tests.chaos.consumer`: the real consumer, with an engine that needs no model and keeps a ledger.

It starts in a second and draws in milliseconds, so that faults meet it thousands of times.
"""

import hashlib
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from consumer import failpoints
from consumer.__main__ import main
from consumer.engine import Engine, GeneratedImage, LoraFile, OnStep, PreparedLoras
from consumer.errors import GenerationFailed, GpuOutOfMemory, LoraInvalid, ModelBroken
from consumer.settings import ConsumerSettings
from schemas.requests import GenerationRequest
from tests.chaos.surroundings import surroundings

LEDGER = "CHAOS_LEDGER"
STEP_S = "CHAOS_STEP_S"


class LedgerEngine:
    """Draws a small picture that depends on the seed alone. Every drawing is a line in the ledger: `<job_id> <pid>`.

    A prompt that says `out of memory`, `device lost` or `black` is taken at its word when its job is drawn for the
    first time, and always if it says that too. One that says `deadly` kills this process halfway.
    """

    base_model = "ledger"
    gpu = "none"

    def __init__(self, ledger: Path, step_s: float) -> None:
        self._ledger = ledger
        self._step_s = step_s

    def prepare(self, files: Sequence[LoraFile]) -> PreparedLoras:
        for file in files:
            if not file.path.read_bytes().startswith(b"lora"):
                raise LoraInvalid("not a LoRA")
        return PreparedLoras()

    def generate(self, request: GenerationRequest, loras: PreparedLoras, on_step: OnStep) -> GeneratedImage:
        with failpoints.around("patch"):
            is_first = self._note(request.job_id)
        if is_first or "always" in request.prompt:
            _fail(request.prompt)
        for step in range(1, request.steps + 1):
            time.sleep(self._step_s)
            on_step(step, request.steps)
            if "deadly" in request.prompt and step > request.steps / 2:
                os.kill(os.getpid(), signal.SIGKILL)
        seed = hashlib.sha256(str(request.effective_seed).encode()).digest()
        pixels = np.resize(np.frombuffer(seed, np.uint8), (16, 16, 3))
        return GeneratedImage(pixels, seconds=request.steps * self._step_s)

    def warm_up(self) -> None:
        """There is nothing to warm."""

    def _note(self, job_id: str) -> bool:
        """Whether this is the job's first line."""
        with self._ledger.open("a+") as ledger:
            ledger.write(f"{job_id} {os.getpid()}\n")
            ledger.seek(0)
            return sum(line.split()[0] == job_id for line in ledger) == 1


def _fail(prompt: str) -> None:
    if "out of memory" in prompt:
        raise GpuOutOfMemory("as the prompt says")
    if "device lost" in prompt:
        raise ModelBroken("as the prompt says")
    if "black" in prompt:
        raise GenerationFailed("The model drew a black image.")


def load(settings: ConsumerSettings) -> Engine:
    return LedgerEngine(Path(os.environ[LEDGER]), float(os.environ[STEP_S]))


if __name__ == "__main__":
    with surroundings(os.environ):
        main(load)
