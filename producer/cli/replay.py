"""`dead replay`: runs jobs again that died."""

import asyncio
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

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
)
from producer.dead_letters import Pace, Replayer, ReplayResult, Verdict, replay_each
from schemas import strict_json

_LORA_FIELDS = {"lora_url", "lora_key", "loras"}
_ONE_JOB_EACH = {"output_key", "upload_url"}
_AS_ASKED = (Verdict.REPLAYED, Verdict.WOULD_REPLAY)
_FAILED = (Verdict.REFUSED, Verdict.UNDECODABLE, Verdict.QUEUE_FULL)
_STYLES = {Verdict.REPLAYED: "green", Verdict.ALREADY: "yellow", Verdict.GONE: "yellow"} | dict.fromkeys(_FAILED, "red")

Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Replace a field: JSON, else a string; may be repeated."),
]
LoraUrl = Annotated[
    str | None, typer.Option(metavar="URL", help="Replace the LoRA: a freshly signed URL, for example.")
]
Rate = Annotated[float | None, typer.Option(metavar="N", help="At most so many jobs per second.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen, and write nothing.")]


async def replay_letters(
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
    sets: Sets = None,
    lora_url: LoraUrl = None,
    rate: Rate = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> Status:
    """Run jobs again that died: those named, those that fit the filters, or all.

    An interrupted replay ends after the letter at hand; the same command
    goes on from there. With --json: a line for each letter, the summary last.
    """
    check_choice(context.params)
    changes = parse_changes(sets or (), lora_url)
    async with open_client() as client:
        replayer = Replayer(client.queue, storage=client.storage, changes=changes, dry_run=dry_run)
        with _stopped_by_signals() as stop:
            pace = _pace(rate, stop)
            chosen = await choose(client.queue, context.params)
            if len(chosen) > 1 and _ONE_JOB_EACH & changes.keys():
                raise BadUsage("output_key and upload_url are one job's own: name one letter")
            with Board(len(chosen), named=bool(entry_ids), as_json=as_json) as board:
                async for result in replay_each(replayer, chosen, pace):
                    board.show(result)
    return board.status


def parse_changes(sets: Sequence[str], lora_url: str | None) -> dict[str, Any]:
    """The fields to replace. Raises BadUsage."""
    changes: dict[str, Any] = {}
    for text in sets:
        name, equals, value = text.partition("=")
        if not equals:
            raise BadUsage("--set takes FIELD=VALUE")
        if name in changes:
            raise BadUsage(f"--set names {name} twice")
        changes[name] = _value(value)
    if lora_url is None:
        return changes
    if taken := sorted(_LORA_FIELDS & changes.keys()):
        raise BadUsage(f"--lora-url excludes --set {taken[0]}")
    return {**changes, "lora_url": lora_url}


class Board:
    """A bar on a terminal; a line for each letter that was named or not replayed; last, the summary.

    With JSON: a line for each letter and for the summary. The summary comes after a failure too.
    """

    def __init__(self, total: int, *, named: bool, as_json: bool) -> None:
        self._total = total
        self._named = named
        self._as_json = as_json
        self._console = output.stdout()
        self._bars = Bars(
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=as_json or not self._console.is_terminal,
        )
        self._bar = self._bars.add_task("", total=total)
        self._counts: Counter[tuple[str, Verdict]] = Counter()
        self._retry_after: int | None = None

    def __enter__(self) -> "Board":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()
        if self._as_json:
            output.print_json({"summary": self._document()}, lines=True)
        else:
            self._summarise()

    def show(self, result: ReplayResult) -> None:
        self._counts[result.error_code or "", result.verdict] += 1
        self._retry_after = max(
            (one for one in (self._retry_after, result.retry_after) if one is not None), default=None
        )
        self._bars.advance(self._bar)
        if self._as_json:
            output.print_json(asdict(result), lines=True)
        elif self._named or result.verdict not in _AS_ASKED:
            self._console.print(_line(result), soft_wrap=True)

    @property
    def status(self) -> Status:
        """FAILED where a letter is left that was to go, USAGE where one that was named is not there."""
        verdicts = {verdict for _, verdict in self._counts}
        if self._named and Verdict.GONE in verdicts:
            return Status.USAGE
        return Status.FAILED if self._not_reached or verdicts.intersection(_FAILED) else Status.OK

    @property
    def _not_reached(self) -> int:
        return self._total - self._counts.total()

    def _document(self) -> dict[str, Any]:
        verdicts: Counter[str] = Counter()
        codes: dict[str, dict[str, int]] = {}
        for (code, verdict), count in sorted(self._counts.items()):
            verdicts[verdict] += count
            codes.setdefault(code, {})[verdict] = count
        left = {"not_reached": self._not_reached, "retry_after": self._retry_after}
        return {"letters": self._total, "verdicts": verdicts, "error_codes": codes, **left}

    def _summarise(self) -> None:
        if not self._total:
            self._console.print("no dead letters")
            return
        document = self._document()
        verdicts, codes = document["verdicts"], document["error_codes"]
        rows = [(code or "none", *(counts.get(one, 0) for one in verdicts)) for code, counts in codes.items()]
        self._console.print(output.table(("error code", *verdicts), [*rows, ("all", *verdicts.values())]))
        if self._retry_after is not None:
            output.note(f"not all had room: run it again in {self._retry_after} s")
        if self._not_reached:
            output.note(f"{self._not_reached} not reached: the same command goes on from here")


def _line(result: ReplayResult) -> Text:
    line = Text(f"{result.entry_id}  {output.visible(result.job_id or '-')}  ")
    line.append(result.verdict, _STYLES.get(result.verdict, "default"))
    return line.append(f"  {output.visible(result.reason)}" if result.reason else "")


def _value(text: str) -> Any:
    try:
        return strict_json.loads(text.encode("utf-8", "surrogateescape"))
    except strict_json.StrictJsonError:
        return text


def _pace(rate: float | None, stop: asyncio.Event) -> Pace:
    try:
        return Pace(rate, stop=stop)
    except ValueError as error:
        raise BadUsage(f"--rate: {error}") from None


@contextmanager
def _stopped_by_signals() -> Iterator[asyncio.Event]:
    """An event that the first SIGINT or SIGTERM sets; a second one acts as it always does."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def restore() -> None:
        for number in numbers:
            loop.remove_signal_handler(number)

    def stop_once() -> None:
        restore()
        stop.set()

    for number in numbers:
        loop.add_signal_handler(number, stop_once)
    try:
        yield stop
    finally:
        restore()
