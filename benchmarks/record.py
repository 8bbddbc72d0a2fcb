"""A benchmark's results: JSON, a line for each, every line with where and how it came about."""

import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.environment import environment

RESULTS = Path(__file__).parent / "results"


def record(
    benchmark: str,
    command: str,
    workload: Mapping[str, Any] | str,
    results: Iterable[Mapping[str, Any]],
    out: Path | None,
) -> list[Mapping[str, Any]]:
    """Prints each result as it comes, and adds it to the file `out`. Returns them."""
    head = {"benchmark": benchmark, "command": command, "workload": workload}
    where = environment()
    told = []
    for result in results:
        told.append(result)
        measured_at = datetime.now(UTC).isoformat(timespec="seconds")
        line = json.dumps({**head, **result, "measured_at": measured_at, "environment": where})
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("a") as file:
                file.write(line + "\n")
    return told


def command_line(module: str, words: Sequence[str]) -> str:
    """The command for the record: paths by their last part, since the rest is of one machine."""
    return shlex.join(["python", "-m", module, *(Path(word).name if "/" in word else word for word in words)])


def newest(file: Path, *names: str) -> list[dict[str, Any]]:
    """The newest line for each combination of the fields `names`, in the order in which they first came.

    None of them where there is no such file.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in file.read_text().splitlines() if file.is_file() else ():
        result = json.loads(line)
        found[tuple(result.get(name) for name in names)] = result
    return list(found.values())
