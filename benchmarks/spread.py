"""What many measurements come to."""

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """n, mean, min, p50, p95, max; of nothing, n alone."""
    if not values:
        return {"n": 0}
    ordered = sorted(values)
    found = {
        "mean": statistics.fmean(ordered),
        "min": ordered[0],
        "p50": statistics.median(ordered),
        "p95": ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))],
        "max": ordered[-1],
    }
    return {"n": len(ordered), **{name: round(value, digits) for name, value in found.items()}}
