"""What Triton's kernels need: of this machine, and at every launch."""

import os
import shutil
from importlib.util import find_spec
from typing import Any

# Product and sum are rounded once, as everything was measured: Triton's own default is about to change.
LAUNCH_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


def why_no_triton() -> str | None:
    """What is missing to compile Triton's kernels, or None. Each is started by a little C program of its own."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if os.environ.get("CC") is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        return "there is no C compiler for Triton: gcc, clang, or what CC names"
    return None
