"""Where a benchmark ran: results without it say little."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "triton", "diffusers", "transformers", "safetensors", "peft", "redis", "aiohttp", "boto3", "isal")
_ROOT = Path(__file__).resolve().parents[1]


def environment(libraries: Sequence[str] = LIBRARIES) -> dict[str, Any]:
    """GPU, driver, CUDA, processor, system, versions, git commit; None where this machine has no such thing.

    `libraries`: the distributions whose versions matter.
    """
    gpu, driver, power_limit = _gpu()
    return {
        "gpu": gpu,
        "driver": driver,
        "power_limit": power_limit,
        "cuda": _cuda(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.system(),
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in libraries},
        "commit": _output(["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=10"]),
    }


def _gpu() -> tuple[str | None, str | None, str | None]:
    fields = "--query-gpu=name,driver_version,power.limit"
    found = _output(["nvidia-smi", fields, "--format=csv,noheader", "--id=0"])
    if found is None or found.count(",") != 2:
        return None, None, None
    name, driver, power_limit = (field.strip() for field in found.split(","))
    return name, driver, power_limit


def _cuda() -> str | None:
    import torch  # takes seconds, which a benchmark that needs no torch would rather not wait for

    return torch.version.cuda


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _output(command: Sequence[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
