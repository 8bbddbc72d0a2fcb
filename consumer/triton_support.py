"""Whether Triton's kernels can run on this machine."""

import os
import shutil
from importlib.util import find_spec


def why_no_triton() -> str | None:
    """What is missing to compile Triton's kernels, or None. Each is started by a little C program of its own."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if os.environ.get("CC") is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        return "there is no C compiler for Triton: gcc, clang, or what CC names"
    return None
