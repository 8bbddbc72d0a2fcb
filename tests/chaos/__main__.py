"""`make chaos`: every fault by name, a soak of random faults, and two tests of `make test` with a large budget."""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.chaos.report import OUT

_FOLDER = Path("build/chaos")
_PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
_JOBS = "100000"
_PARTS = ("faults", "soak", "state machine", "bounded memory")


def main() -> int:
    """Runs every part, whatever has become of the one before, then the report. 1 where any of them has failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--only", action="append", choices=_PARTS, help="one part, beside the last run's results")
    parser.add_argument("--minutes", type=float, default=5.0, help="how long the soak lasts")
    parser.add_argument("--seed", type=int, help="the soak's; a new one if not given")
    arguments = parser.parse_args()
    seed = [] if arguments.seed is None else ["--seed", str(arguments.seed)]
    parts = {
        "faults": [*_PYTEST, "-n", "3", "tests/chaos"],  # which wait more than they work
        "soak": ["-m", "tests.chaos.soak", "--minutes", str(arguments.minutes), *seed],
        "state machine": [*_PYTEST, "tests/integration/test_queue_machine.py"],
        "bounded memory": [*_PYTEST, "tests/integration/test_bounded_memory.py"],
    }
    chosen = {name: parts[name] for name in arguments.only or _PARTS}
    if not arguments.only:
        shutil.rmtree(_FOLDER, ignore_errors=True)
    statuses = {name: _run_part(name, command) for name, command in chosen.items()}
    report = _run("report", ["-m", "tests.chaos.report"], {OUT: str(_FOLDER.resolve())})
    for name, status in statuses.items():
        print(f"{name}: {'ok' if status == 0 else f'failed with status {status}'}")
    return 1 if report or any(statuses.values()) else 0


def _run_part(name: str, command: list[str]) -> int:
    """Each part has a folder for what it finds, and its exit status."""
    folder = _FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    budgets = {"SDXL_CHAOS_EXAMPLES": "large", "SDXL_CHAOS_JOBS": _JOBS}
    status = _run(name, command, {OUT: str(folder.resolve()), **budgets})
    (folder / "status").write_text(str(status))
    return status


def _run(name: str, command: list[str], environment: dict[str, str]) -> int:
    print(f"--- {name}", flush=True)
    return subprocess.run([sys.executable, *command], env=os.environ | environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
