"""The table of `make chaos`: what was injected, how long recovery took, and what it cost."""

import json
import os
import statistics
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.listener import hardware

OUT = "SDXL_CHAOS_OUT"
RESULTS = Path(__file__).parents[2] / "benchmarks/results/chaos.json"
FAULTS = 46
_COUNTS = ("lost", "duplicate_publications", "duplicate_executions", "leaked_signatures")
_SECONDS = ("recovery_p50_s", "recovery_p99_s")
_LIBRARIES = ("redis", "aiohttp", "boto3", "sqlalchemy", "pydantic", "rq", "hypothesis")


@dataclass(frozen=True, slots=True)
class Result:
    """One fault: its number in the catalogue (docs/faults.md), or 0 for what is not in it.

    `counts`: what `World.verify` has counted; none where that was not done for this fault alone. `figures` are whatever
    else there is to say.
    """

    number: int
    fault: str
    injected: int
    recoveries_s: list[float]
    counts: dict[str, int] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


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


def rows(lines: Iterable[str]) -> list[dict[str, Any]]:
    """One row for each fault, in the catalogue's order: a fault that several tests inject is summed up.

    What has the number 0 comes last, in the order in which it was noted, summed up by its name.
    """
    merged: dict[tuple[int, str], dict[str, Any]] = {}
    for one in map(json.loads, lines):
        counts = one.pop("counts")
        key = (one["number"], "") if one["number"] else (FAULTS + 1, one["fault"])
        row = merged.setdefault(key, {**one, "recoveries_s": [], "injected": 0, **dict.fromkeys(_COUNTS)})
        row["recoveries_s"] = [*row["recoveries_s"], *one["recoveries_s"]]
        row["injected"] += one["injected"]
        for name in _COUNTS:
            row[name] = _sum(row[name], counts.get(name))
    for row in merged.values():
        recoveries = row.pop("recoveries_s")
        row["recoveries"] = len(recoveries)
        row["recovery_p50_s"] = round(statistics.median(recoveries), 3) if recoveries else None
        row["recovery_p99_s"] = quantile_s(recoveries, 0.99)
    return [merged[key] for key in sorted(merged, key=lambda key: key[0])]


def missing(table_rows: list[dict[str, Any]]) -> list[int]:
    """The faults of the catalogue that no test has told of."""
    return sorted(set(range(1, FAULTS + 1)) - {row["number"] for row in table_rows})


def show(table_rows: list[dict[str, Any]], console: Console) -> None:
    table = Table("", "fault", "injected", "p50 s", "p99 s", "lost", "published twice", "drawn twice", "leaks")
    for row in table_rows:
        seconds = (_cell(row[name], ".2f") for name in _SECONDS)
        counts = (_cell(row[name], "d") for name in _COUNTS)
        table.add_row(str(row["number"] or ""), row["fault"], str(row["injected"]), *seconds, *counts)
    console.print(table)
    for row in table_rows:
        if row["figures"]:
            console.print(f"{row['fault']}: " + ", ".join(f"{name} {value}" for name, value in row["figures"].items()))


def document(table_rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What is written as JSON. `parts`: the exit status of each part of the run; `memory`: its samples, if it ran."""
    memory = next(folder.glob("*/memory.json"), None)
    return {
        "command": "make chaos",
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": {
            "python": sys.version.split()[0],
            **{name: metadata.version(name) for name in _LIBRARIES},
        },
        "parts": {file.parent.name: int(file.read_text()) for file in sorted(folder.glob("*/status"))},
        "missing_faults": missing(table_rows),
        "faults": table_rows,
        "memory": None if memory is None else json.loads(memory.read_text()),
    }


def main() -> int:
    """Reads what the parts have noted, prints the table, and writes it. 1 where a fault of the catalogue is missing."""
    folder = Path(os.environ[OUT])
    table_rows = rows(
        line for noted in sorted(folder.glob("*/faults.jsonl")) for line in noted.read_text().splitlines()
    )
    console = Console(width=None if sys.stdout.isatty() else 150)
    show(table_rows, console)
    RESULTS.write_text(json.dumps(document(table_rows, folder), indent=2) + "\n")
    if absent := missing(table_rows):
        console.print(f"no result of these faults: {', '.join(map(str, absent))}")
    return 1 if absent else 0


def _sum(one: int | None, other: int | None) -> int | None:
    return other if one is None else one + (other or 0)


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


if __name__ == "__main__":
    sys.exit(main())
