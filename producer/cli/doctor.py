"""`doctor`: looks at everything that this side stands on."""

from collections.abc import Sequence
from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from producer.cli import output
from producer.cli.command import AsJson, Status, checked_settings
from producer.doctor.examination import examine
from producer.doctor.findings import Finding, Verdict

_STYLES = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "bold red", Verdict.SKIPPED: "dim"}


async def doctor(as_json: AsJson = False) -> Status:
    """Check Redis, the queue, storage, database and webhooks, and say what to do."""
    with checked_settings() as settings:
        findings = await examine(settings)
    if as_json:
        output.print_json([asdict(finding) for finding in findings])
    else:
        console = output.stdout()
        console.print(_table(findings))
        console.print()
        console.print(_summary(findings))
    if any(finding.out_of_reach for finding in findings):
        return Status.UNREACHABLE
    return Status.FAILED if any(finding.verdict is Verdict.FAIL for finding in findings) else Status.OK


def _table(findings: Sequence[Finding]) -> Table:
    shown = Table.grid(padding=(0, 2))
    shown.add_column(no_wrap=True)
    shown.add_column(no_wrap=True)
    shown.add_column(overflow="fold")
    for finding in findings:
        found = Text(output.visible(finding.found), "dim" if finding.verdict is Verdict.SKIPPED else "default")
        if finding.hint is not None:
            found.append("\n" + output.visible(finding.hint), "italic cyan")
        name = output.visible(f"{finding.area}: {finding.check}")
        shown.add_row(Text(finding.verdict, _STYLES[finding.verdict]), name, found)
    return shown


def _summary(findings: Sequence[Finding]) -> str:
    counts = ((verdict, sum(finding.verdict is verdict for finding in findings)) for verdict in Verdict)
    return ", ".join(f"{count} {verdict}" for verdict, count in counts if count)
