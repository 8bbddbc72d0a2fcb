"""The table of `make chaos`: what was injected, how long recovery took, and what it cost."""

import json
import os
import platform
import statistics
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

OUT = "SDXL_CHAOS_OUT"


@dataclass(frozen=True, slots=True)
class Result:
    """One fault: its number in the catalogue (docs/faults.md), or 0 for the soak."""

    number: int
    fault: str
    injected: int
    recoveries_s: list[float]
    lost: int
    duplicate_publications: int
    duplicate_executions: int
    leaked_signatures: int


def note(result: Result) -> None:
    """Adds a line to the results of this run, if it keeps any."""
    folder = os.environ.get(OUT)
    if folder:
        with (Path(folder) / "faults.jsonl").open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")


def quantile_s(recoveries_s: list[float], q: float) -> float | None:
    """The nearest-rank quantile in seconds; None of nothing."""
    if not recoveries_s:
        return None
    ranked = sorted(recoveries_s)
    return round(ranked[min(len(ranked) - 1, int(q * len(ranked)))], 3)


def rows(lines: list[str]) -> list[dict[str, Any]]:
    """One row for each fault, in the catalogue's order: a fault that several tests inject is summed up."""
    merged: dict[int, dict[str, Any]] = {}
    for one in map(json.loads, lines):
        row = merged.setdefault(one["number"], {**one, "recoveries_s": []} | dict.fromkeys(_COUNTS, 0))
        row["recoveries_s"] = [*row["recoveries_s"], *one["recoveries_s"]]
        for name in _COUNTS:
            row[name] += one[name]
    for row in merged.values():
        recoveries = row.pop("recoveries_s")
        row["recovery_p50_s"] = round(statistics.median(recoveries), 3) if recoveries else None
        row["recovery_p99_s"] = quantile_s(recoveries, 0.99)
    return [merged[number] for number in sorted(merged)]


_COUNTS = ("injected", "lost", "duplicate_publications", "duplicate_executions", "leaked_signatures")


def show(table_rows: list[dict[str, Any]], console: Console) -> None:
    table = Table("", "fault", "injected", "p50 s", "p99 s", "lost", "published twice", "drawn twice", "leaks")
    for row in table_rows:
        table.add_row(
            str(row["number"] or "soak"),
            row["fault"],
            str(row["injected"]),
            *("–" if row[name] is None else f"{row[name]:.2f}" for name in ("recovery_p50_s", "recovery_p99_s")),
            *(str(row[name]) for name in _COUNTS[1:]),
        )
    console.print(table)


def main() -> None:
    """Reads what the tests have noted, prints the table, and writes `chaos.json` beside it."""
    folder = Path(os.environ[OUT])
    table_rows = rows((folder / "faults.jsonl").read_text().splitlines())
    show(table_rows, Console())
    machine = {"platform": platform.platform(), "python": platform.python_version(), "cores": os.cpu_count()}
    made = {"command": "make chaos", "at": datetime.now(UTC).isoformat(timespec="seconds"), **machine}
    (folder / "chaos.json").write_text(json.dumps({**made, "faults": table_rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
