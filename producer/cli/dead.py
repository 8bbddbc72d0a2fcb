"""`dead list`, `dead show` and `dead drop`."""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from producer import dead_letters
from producer.cli import output
from producer.cli.command import AsJson, BadUsage, Status, open_client
from producer.cli.letters import (
    All,
    Codes,
    EntryIds,
    ErrorText,
    JobId,
    Limit,
    Lora,
    NewerThan,
    OlderThan,
    Tenant,
    check_choice,
    choose,
    filter_of,
)
from producer.dead_letters import DeadLetter
from producer.queue import ProducerQueue

EntryId = Annotated[str, typer.Argument(metavar="ENTRY_ID")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say how many there are, and drop none.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


async def list_letters(
    context: typer.Context,
    error_code: Codes = None,
    older_than: OlderThan = None,
    newer_than: NewerThan = None,
    tenant: Tenant = None,
    lora: Lora = None,
    text: ErrorText = None,
    job: JobId = None,
    limit: Limit = None,
    as_json: AsJson = False,
) -> Status:
    """List dead letters that fit all of the filters, the oldest first."""
    where = filter_of(context.params)
    as_shown = _document if as_json else _row
    async with open_client() as client:
        shown = [as_shown(letter) async for letter in dead_letters.find(client.queue, where, limit=limit)]
    if as_json:
        output.print_json(shown)
    elif not shown:
        output.stdout().print("no dead letters")
    else:
        columns = ("entry", "died at", "job", "run", "code", "error")
        output.stdout().print(output.table(columns, shown))
    return Status.OK


async def show_letter(entry_id: EntryId, as_json: AsJson = False) -> Status:
    """Show one dead letter."""
    async with open_client() as client:
        letter = await dead_letters.show(client.queue, entry_id)
    document = _document(letter)
    if as_json:
        output.print_json(document)
        return Status.OK
    event, request = document.pop("event") or {}, document.pop("request") or {}
    error = {name: event.get("data", {}).get(name) for name in ("error_code", "error", "details", "retry_after")}
    output.stdout().print(output.facts_grid({**document, **error}))
    if request:
        output.stdout().print()
        output.stdout().print(output.facts_grid(request))
    return Status.OK


async def drop_letters(
    context: typer.Context,
    entry_ids: EntryIds = None,
    every: All = False,
    error_code: Codes = None,
    older_than: OlderThan = None,
    newer_than: NewerThan = None,
    tenant: Tenant = None,
    lora: Lora = None,
    text: ErrorText = None,
    job: JobId = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> Status:
    """Remove dead letters for good: those named, those that fit the filters, or all.

    Asks before it drops what was not named; without a terminal it refuses to, unless --yes is given.
    """
    check_choice(context.params)
    async with open_client() as client:
        chosen = await choose(client.queue, context.params)
        if dry_run:
            count = len(chosen) if not entry_ids else await _existing(client.queue, chosen)
        elif chosen and not entry_ids and not yes and not _confirmed(len(chosen)):
            return Status.FAILED
        else:
            count = await dead_letters.drop(client.queue, chosen)
    if as_json:
        output.print_json({"would_drop" if dry_run else "dropped": count})
    else:
        output.stdout().print(f"{'would drop' if dry_run else 'dropped'} {count} of {len(chosen)}")
    return Status.USAGE if entry_ids and count != len(chosen) else Status.OK


async def _existing(queue: ProducerQueue, entry_ids: Sequence[str]) -> int:
    return len([entry_id for entry_id in entry_ids if await queue.dead_letter(entry_id) is not None])


def _confirmed(count: int) -> bool:
    """Asks on the terminal. Raises BadUsage where there is none."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise BadUsage(f"this would drop {count} dead letters for good: look at them (--dry-run), then add --yes")
    with _interruptible():
        return typer.confirm(f"Drop {count} dead letters for good?", err=True)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lets Ctrl-C end a question: asyncio's own handler waits for an event loop, which waits for the answer."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _row(letter: DeadLetter) -> tuple[object, ...]:
    error = letter.error or "" if letter.event else "cannot be read"
    died_at = output.time_text(letter.died_at)
    return letter.entry_id, died_at, letter.job_id or "", letter.run or "", letter.error_code or "", error


def _document(letter: DeadLetter) -> dict[str, Any]:
    return {
        "entry_id": letter.entry_id,
        "job_id": letter.job_id,
        "run": letter.run,
        "attempts": letter.attempts,
        "source": letter.source,
        "died_at": letter.died_at.isoformat(),
        "request": letter.request.model_dump(mode="json", exclude_defaults=True) if letter.request else None,
        "payload": _text(letter.payload) if letter.request is None else None,
        "raw": _text(letter.raw),
        "event": letter.event.model_dump(mode="json") if letter.event else None,
    }


def _text(raw: bytes | None) -> str | None:
    return None if raw is None else raw.decode("utf-8", "replace")
