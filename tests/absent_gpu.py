"""Compiles every Triton kernel for a GPU that is not there: `python -m tests.absent_gpu MODEL CAPABILITY`.

Prints a line of JSON for each compilation: `kernel`, `shared` (bytes of shared memory) and `ptx`. In a process of its
own, as Triton either compiles or interprets.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from consumer.engine import LoraFile
from consumer.engine.fast import kernels, norm_kernels, painter
from consumer.engine.preparing import prepare
from consumer.lora import patch_kernel
from demo import loras
from schemas.requests import GenerationRequest, LoraRef


class AbsentDriver:
    """As much of a GPU's driver as a compilation asks for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(model: Path, folder: Path, capability: int) -> None:
    """Whatever a picture with a LoRA launches, found by going through one on the CPU."""
    driver.set_active(AbsentDriver(capability))
    properties = SimpleNamespace(major=capability // 10, multi_processor_count=100)
    with patch("torch.cuda.get_device_properties", return_value=properties):
        ops = painter._ops(torch.device("cuda"))  # what it would take there
    painter._ops = lambda device: ops
    fast = painter.FastPainter.load(str(model), device="cpu", dtype="float16")
    canvas, _ = fast._canvas(GenerationRequest(job_id="job-1", prompt="a red flower", width=512, height=512))
    with torch.no_grad(), fast._ops.compiling():
        canvas.run_once()
    fast.weights._compile_ahead = patch_kernel.compile_ahead
    path = loras.write_peft(folder / "lora.safetensors", fast.shapes.weights, rank=4, alpha=2.0, seed=1, strength=0.6)
    prepare([LoraFile(path, LoraRef(key=path.name))], fast.shapes, fast.weights)


def compiled() -> Iterator[tuple[str, Any]]:
    """Every kernel's name, and what has been compiled of it."""
    for module in (kernels, norm_kernels, patch_kernel):
        for kernel in vars(module).values():
            if isinstance(kernel, triton.JITFunction):
                for made in kernel.device_caches[0][0].values():
                    yield kernel.__name__, made


if __name__ == "__main__":
    with TemporaryDirectory() as temporary:
        os.environ["TRITON_CACHE_DIR"] = temporary
        compile_all(Path(sys.argv[1]), Path(temporary), int(sys.argv[2]))
    for name, made in compiled():
        print(json.dumps({"kernel": name, "shared": made.metadata.shared, "ptx": made.asm["ptx"]}))
