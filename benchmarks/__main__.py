"""`python -m benchmarks`: engines, quality, cold start and worker, one after another.

With `--model`, a diffusers folder, on the device at hand, added to benchmarks/results; without it, the tiny model on
the CPU: a look at whether it all runs.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.record import RESULTS

_SMALL = ("--device", "cpu", "--dtype", "float32", "--size", "512x512", "--steps", "20")
_CPU = {
    "engine": ("--only", "A,A1,D", "--speed", "stock", "--runs", "2", "--warm-ups", "1", "--rank", "4"),
    "quality": ("--quality", "--speed", "stock", "--rank", "4"),
    "cold_start": ("--speeds", "stock", "--runs", "1", "--rank", "4"),
    "worker": ("--jobs", "4", "--serial-jobs", "2", "--speed", "stock", "--rank", "4"),
}
_GPU: dict[str, tuple[str, ...]] = {"engine": (), "quality": ("--quality",), "cold_start": (), "worker": ()}


def commands(model: Path, results: Path, *, small: bool) -> list[list[str]]:
    """The command lines of all benchmarks, each adding to a file of its name in `results`."""
    lines = []
    for name, options in (_CPU if small else _GPU).items():
        module = "engine" if name == "quality" else name
        where = ("--model", str(model), "--out", str(results / f"{name}.jsonl"))
        lines.append([sys.executable, "-m", f"benchmarks.{module}", *where, *(_SMALL if small else ()), *options])
    return lines


def main(words: Sequence[str] | None = None) -> int:
    """Runs them all. Returns the exit status: 1 where one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a diffusers folder")
    model = parser.parse_args(words).model
    with TemporaryDirectory(prefix="bench-") as temporary:
        lines = commands(model or _tiny(Path(temporary)), RESULTS if model else Path(temporary), small=model is None)
        statuses = [subprocess.run(line, check=False).returncode for line in lines]
    return int(any(statuses))


def _tiny(folder: Path) -> Path:
    from demo import tiny_sdxl  # brings torch, which the benchmarks themselves bring when they need it

    return tiny_sdxl.build(folder / "tiny")


if __name__ == "__main__":
    sys.exit(main())
