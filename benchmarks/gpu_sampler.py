"""Clock and power of the GPU while something runs: without them a figure does not say what limited it."""

import shutil
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_QUERY = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "--id=0", "-lms", "200"]


@contextmanager
def sampled_gpu() -> Iterator[dict[str, Any]]:
    """Fills the dictionary at the block's end: median MHz and W, of five samples a second. Empty without nvidia-smi."""
    figures: dict[str, Any] = {}
    if shutil.which(_QUERY[0]) is None:
        yield figures
        return
    with subprocess.Popen(_QUERY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield figures
        finally:
            process.terminate()
            output, _ = process.communicate()
    figures |= parse_samples(output)


def parse_samples(output: str) -> dict[str, Any]:
    """`1410, 688.12` a line to medians; lines without two numbers (`[N/A]`, one that is cut off) are passed over."""
    samples = []
    for line in output.splitlines():
        try:
            clock, power = map(float, line.split(","))
        except ValueError:
            continue
        samples.append((clock, power))
    if not samples:
        return {}
    clocks, powers = zip(*samples, strict=True)
    return {
        "sm_clock_mhz": round(statistics.median(clocks)),
        "power_w": round(statistics.median(powers)),
        "samples": len(samples),
    }
