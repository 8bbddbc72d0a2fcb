"""From a process's start to its first picture, by phase: `python -m benchmarks.cold_start --model FOLDER`.

Each run is a new process. The model's files are in the page cache, as on a machine that has started before; Triton's
cache is empty, or filled by the run before. A first run is not counted: it tells what the imports take.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.lora_files import LoraWriter, attention_layers
from benchmarks.record import command_line, record
from benchmarks.spread import spread
from benchmarks.workload import Workload, add_options

_HEAVY = ("torch", "diffusers", "transformers", "peft", "triton", "boto3", "aiohttp", "redis", "consumer.__main__")


def measured(workload: Workload, speeds: Sequence[str], runs: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Seconds by phase, for each engine with an empty and a filled cache of Triton."""
    for speed in speeds:
        imports_s = imports(start(workload, speed, folder / speed, "-X", "importtime").stderr)
        yield {"speed": speed, "cache": "imports", "imports_s": imports_s}
        empty = [phases(start(workload, speed, folder / f"{speed}-{run}")) for run in range(runs)]
        yield {"speed": speed, "cache": "empty", **_figures(empty)}
        filled = [phases(start(workload, speed, folder / f"{speed}-0")) for _ in range(runs)]
        yield {"speed": speed, "cache": "filled", **_figures(filled)}


class Started:
    """What one process left. `spawned_at`: Unix time."""

    def __init__(self, spawned_at: float, stdout: str, stderr: str) -> None:
        self.spawned_at = spawned_at
        self.stdout = stdout
        self.stderr = stderr


def start(workload: Workload, speed: str, triton_cache: Path, *options: str) -> Started:
    """Runs one process to its first picture. Raises RuntimeError with what it said where it fails."""
    settings = {
        "SDXL_MODEL": str(workload.model),
        "SDXL_DEVICE": workload.device,
        "SDXL_DTYPE": workload.dtype,
        "SDXL_SPEED": speed,
        "TRITON_CACHE_DIR": str(triton_cache),
        "HF_HUB_OFFLINE": "1",
    }
    request = workload.request(1).encode().decode()
    command = [sys.executable, *options, "-m", "benchmarks.first_picture", str(workload.loras[0]), request]
    spawned_at = time.time()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **settings})
    if done.returncode:
        raise RuntimeError(f"the start failed:\n{done.stderr[-2000:]}")
    return Started(spawned_at, done.stdout, done.stderr)


def phases(started: Started) -> dict[str, float]:
    """Seconds by phase, in order."""
    seconds = {}
    before = started.spawned_at
    for name, at in json.loads(started.stdout.splitlines()[-1]):
        seconds[name] = at - before
        before = at
    return seconds


def imports(stderr: str) -> dict[str, float]:
    """Seconds that the heavy modules took, with what they import, from what `-X importtime` says."""
    seconds = {}
    for line in stderr.splitlines():
        columns = line.removeprefix("import time:").split("|")
        if len(columns) == 3 and columns[2].strip() in _HEAVY:
            seconds[columns[2].strip()] = round(int(columns[1]) / 1e6, 3)
    return seconds


def _figures(runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    return {
        "seconds": spread([sum(run.values()) for run in runs]),
        "parts": {phase: spread([run[phase] for run in runs]) for phase in runs[0]},
    }


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--speeds", type=lambda text: text.split(","), default=["stock", "fast"])
    parser.add_argument("--runs", type=int, default=3)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else words
    arguments = parse_arguments(words)
    with TemporaryDirectory(prefix="cold-start-") as temporary:
        folder = Path(temporary)
        lora = LoraWriter(attention_layers(arguments.model)).write(folder / "lora", rank=arguments.rank, seed=1)
        workload = Workload.of(arguments, [lora], warm_ups=0)
        results = measured(workload, arguments.speeds, arguments.runs, folder)
        record("cold_start", command_line("benchmarks.cold_start", words), workload.described(), results, arguments.out)


if __name__ == "__main__":
    main()
