"""`python -m schemas export [--check] [FOLDER]`: writes the contract's documents, or compares them with those there."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

from schemas.export import documents

DEFAULT_FOLDER = Path("docs/contract")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 where `--check` finds a difference."""
    parser = argparse.ArgumentParser(prog="python -m schemas", description="The wire contract as documents.")
    commands = parser.add_subparsers(required=True)
    export = commands.add_parser("export", help="write JSON Schema and AsyncAPI documents")
    export.add_argument("--check", action="store_true", help="write nothing; exit 1 where the files there differ")
    export.add_argument("folder", nargs="?", type=Path, default=DEFAULT_FOLDER, metavar="FOLDER")
    options = parser.parse_args(arguments)
    return check(options.folder) if options.check else write(options.folder)


def write(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in documents(folder).items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    return 0


def check(folder: Path) -> int:
    """Prints what `write` would change; a document that is exported no longer is a difference too."""
    exported = documents(folder)
    there = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.json")}
    status = 0
    for name in sorted(exported.keys() | there.keys()):
        before = there.get(name, "").splitlines(keepends=True)
        after = exported.get(name, "").splitlines(keepends=True)
        difference = list(difflib.unified_diff(before, after, f"{name} (committed)", f"{name} (exported)"))
        sys.stdout.writelines(difference)
        status = 1 if difference else status
    return status


if __name__ == "__main__":
    sys.exit(main())
