"""How the `dead` commands are told which dead letters they are about."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from producer import dead_letters
from producer.cli.command import BadUsage
from producer.dead_letters import LetterFilter
from producer.queue import ProducerQueue
from producer.stream_ids import is_stream_id
from schemas.errors import ErrorCode

_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}

EntryIds = Annotated[list[str] | None, typer.Argument(metavar="[ENTRY_ID...]", show_default=False)]
All = Annotated[bool, typer.Option("--all", help="Every dead letter.")]
Codes = Annotated[
    list[ErrorCode] | None,
    typer.Option("--error-code", help="Those that failed so; may be repeated.", show_choices=False),
]
OlderThan = Annotated[str | None, typer.Option(metavar="AGE", help="Those that died longer ago: 90s, 30m, 2h, 7d.")]
NewerThan = Annotated[str | None, typer.Option(metavar="AGE", help="Those that died more recently.")]
Tenant = Annotated[str | None, typer.Option(help="Those of one tenant.")]
Lora = Annotated[str | None, typer.Option(metavar="PART", help="Those with this in a LoRA's key or URL.")]
ErrorText = Annotated[str | None, typer.Option("--text", metavar="PART", help="Those with this in the error.")]
JobId = Annotated[str | None, typer.Option("--job", metavar="JOB_ID", help="Those of one job.")]
Limit = Annotated[int | None, typer.Option(min=1, max=1_000_000, help="Only the oldest so many.")]


def filter_of(options: Mapping[str, Any]) -> LetterFilter:
    """The filter that a command's options describe, by their names. Raises BadUsage."""
    now = datetime.now(UTC)
    try:
        return LetterFilter(
            error_codes=tuple(options["error_code"] or ()),
            died_before=_ago(now, options["older_than"]),
            died_after=_ago(now, options["newer_than"]),
            tenant=options["tenant"],
            lora=options["lora"],
            text=options["text"],
            job_id=options["job"],
        )
    except ValueError as error:
        raise BadUsage(str(error)) from None


def check_choice(options: Mapping[str, Any]) -> None:
    """Raises BadUsage unless the options name letters, or describe them, or mean all of them."""
    named, every, described = options["entry_ids"], options["every"], filter_of(options) != LetterFilter()
    if bool(named) + bool(every) + described != 1:
        raise BadUsage("give entry ids, or filters, or --all")
    if named and options["limit"]:
        raise BadUsage("--limit goes with filters or --all")
    for entry_id in named or ():
        if not is_stream_id(entry_id):
            raise BadUsage(f"{entry_id} is not an entry id")


async def choose(queue: ProducerQueue, options: Mapping[str, Any]) -> list[str]:
    """The entry ids that the options name (each once) or describe, in order."""
    if options["entry_ids"]:
        return list(dict.fromkeys(options["entry_ids"]))
    letters = dead_letters.find(queue, filter_of(options), limit=options["limit"])
    return [letter.entry_id async for letter in letters]


def _ago(now: datetime, age: str | None) -> datetime | None:
    if age is None:
        return None
    match = _DURATION.fullmatch(age)
    if match is None:
        raise BadUsage(f"{age} is not an age: 90s, 30m, 2h, 7d")
    try:
        return now - timedelta(**{_UNITS[match[2]]: float(match[1])})
    except OverflowError:
        raise BadUsage(f"{age} is longer than the calendar") from None
