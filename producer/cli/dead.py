"""`dead`: list, show, replay and drop dead letters."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from producer import dead_letters
from producer.cli import output
from producer.cli.command import AsJson, BadUsage, Status, open_client, parse_json
from producer.dead_letters import DeadLetter, ReplayResult, Verdict
from schemas.errors import ErrorCode

EntryId = Annotated[str, typer.Argument(metavar="ENTRY_ID")]
EntryIds = Annotated[list[str], typer.Argument(metavar="ENTRY_ID...")]
MaybeEntryIds = Annotated[list[str] | None, typer.Argument(metavar="[ENTRY_ID...]", show_default=False)]
Code = Annotated[ErrorCode | None, typer.Option("--error-code", help="Only those that failed so.", show_choices=False)]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the oldest so many.")]
All = Annotated[bool, typer.Option("--all", help="Every dead letter.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen, and write nothing.")]
Changes = Annotated[
    str | None, typer.Option(metavar="JSON", help="Fields to replace in each request, a fresh lora_url for example.")
]


async def list_letters(error_code: Code = None, limit: Limit = None, as_json: AsJson = False) -> Status:
    """List dead letters, the oldest first."""
    async with open_client() as client:
        letters = await dead_letters.list_dead(client.queue, error_code=error_code, limit=limit)
    if as_json:
        output.print_json([_document(letter) for letter in letters])
    elif not letters:
        output.stdout().print("no dead letters")
    else:
        columns = ("entry", "died at", "job", "run", "code", "error")
        output.stdout().print(output.table(columns, map(_row, letters)))
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


async def replay_letters(
    entry_ids: MaybeEntryIds = None,
    every: All = False,
    error_code: Code = None,
    changes: Changes = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> Status:
    """Run jobs again that died: those named, all of one error code, or all."""
    if bool(entry_ids) + every + (error_code is not None) != 1:
        raise BadUsage("give entry ids, or --error-code, or --all")
    edits = parse_json(changes, "--changes") if changes is not None else {}
    if not isinstance(edits, dict) or "job_id" in edits:
        raise BadUsage("--changes takes an object of fields, without job_id")
    async with open_client() as client:
        if entry_ids:
            letters = [await dead_letters.show(client.queue, entry_id) for entry_id in dict.fromkeys(entry_ids)]
        else:
            letters = await dead_letters.list_dead(client.queue, error_code=error_code)
        results = await dead_letters.replay(client, client.queue, letters, changes=edits, dry_run=dry_run)
    if as_json:
        output.print_json([asdict(result) for result in results])
    else:
        rows = ((one.entry_id, one.job_id or "", one.verdict, one.run or "", one.reason or "") for one in results)
        output.stdout().print(output.table(("entry", "job", "verdict", "run", "reason"), rows))
    return max([Status.OK, *map(_status, results)])


async def drop_letters(entry_ids: EntryIds, as_json: AsJson = False) -> Status:
    """Remove dead letters for good."""
    async with open_client() as client:
        unique = list(dict.fromkeys(entry_ids))
        dropped = await dead_letters.drop(client.queue, unique)
    if as_json:
        output.print_json({"dropped": dropped})
    else:
        output.stdout().print(f"dropped {dropped} of {len(unique)}")
    return Status.OK if dropped == len(unique) else Status.USAGE


def _status(result: ReplayResult) -> Status:
    return Status.FAILED if result.verdict in (Verdict.REFUSED, Verdict.UNDECODABLE) else Status.OK


def _row(letter: DeadLetter) -> tuple[object, ...]:
    error = getattr(letter.event.data, "error", "") if letter.event else "cannot be read"
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
