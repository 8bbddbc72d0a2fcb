"""How the commands show things: text from elsewhere never acts on the terminal."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_UNLIMITED = 100_000
_STYLES = {
    "succeeded": "green",
    "failed": "red",
    "cancelled": "yellow",
    "running": "cyan",
    "preparing": "cyan",
    "delayed": "magenta",
    "silent": "yellow",
}


def stdout() -> Console:
    """The console for results: what is printed is data, and is cut nowhere on its way into a file or a program."""
    width = None if sys.stdout.isatty() else _UNLIMITED
    return Console(markup=False, emoji=False, highlight=False, width=width)


def complain(message: str) -> None:
    """One line on stderr: what went wrong."""
    _say(Text("error: ", "bold red"), message)


def note(message: str) -> None:
    """One line on stderr: what is worth knowing."""
    _say(Text("note: ", "yellow"), message)


def _say(label: Text, message: str) -> None:
    console = Console(stderr=True, markup=False, emoji=False, highlight=False)
    console.print(label.append(visible(message), "not bold default"), soft_wrap=True)


def print_line(text: Text) -> None:
    """A line on stdout. Raises BrokenPipeError, where rich's console would leave the process."""
    console = stdout()
    with console.capture() as line:
        console.print(text, soft_wrap=True)
    sys.stdout.write(line.get())
    sys.stdout.flush()


def print_json(document: Any, *, lines: bool = False) -> None:
    """A document: indented for people, on one line for programs and as one of several `lines`. It is all ASCII."""
    indent = 2 if sys.stdout.isatty() and not lines else None
    sys.stdout.write(json.dumps(document, indent=indent) + "\n")
    sys.stdout.flush()


def visible(value: object) -> str:
    """The text with everything written out that would move the cursor, change the colour or the writing direction."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "replace").decode() for letter in str(value)
    )


def state_text(state: str) -> Text:
    return Text(visible(state), _STYLES.get(state, "default"))


def time_text(time: datetime | None) -> str:
    return "" if time is None else time.astimezone(UTC).isoformat(sep=" ", timespec="seconds").replace("+00:00", "Z")


def facts_grid(facts: Mapping[str, object]) -> Table:
    """Names beside values; what is None is left out."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        if value is not None:
            grid.add_row(name, value if isinstance(value, Text) else visible(value))
    return grid


def table(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> Table:
    """A plain table with a head; its last column takes what room is left."""
    shown = Table(box=None, header_style="bold", pad_edge=False)
    for name in columns[:-1]:
        shown.add_column(name, no_wrap=True)
    shown.add_column(columns[-1], overflow="fold")
    for row in rows:
        shown.add_row(*(value if isinstance(value, Text) else visible(value) for value in row))
    return shown
