"""`status`, `cancel` and `stats`."""

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.text import Text

from producer.cli import output
from producer.cli.command import AsJson, Status, open_client
from producer.jobs import CancelVerdict, JobStatus
from schemas.events import FailedEvent, SucceededEvent

JobId = Annotated[str, typer.Argument(metavar="JOB_ID")]


async def status(job_id: JobId, as_json: AsJson = False) -> Status:
    """Show how far a job has come."""
    async with open_client() as client:
        found = await client.status(job_id)
    if as_json:
        output.print_json(_document(found))
    else:
        output.stdout().print(output.facts_grid(_facts(found)))
    return Status.OK


async def cancel(job_id: JobId, as_json: AsJson = False) -> Status:
    """Cancel a job: at once if it waits, else at its consumer's next step."""
    async with open_client() as client:
        outcome = await client.cancel(job_id)
    if as_json:
        output.print_json(asdict(outcome))
        return Status.OK
    said = {
        CancelVerdict.CANCELLED: f"cancelled (it was {outcome.state})",
        CancelVerdict.ASKED: f"asked its consumer to stop (it is {outcome.state})",
        CancelVerdict.ENDED: f"nothing to cancel: it has {outcome.state}",
    }[outcome.verdict]
    if outcome.state is None:
        said = "asked; nothing is known of this job yet"
    elif outcome.state == "cancelled":
        said = "nothing to cancel: it was cancelled before"
    output.stdout().print(f"{job_id}  {said}", soft_wrap=True)
    return Status.OK


async def stats(as_json: AsJson = False) -> Status:
    """Show how much waits, what was counted, and the consumers of the last hour."""
    async with open_client() as client:
        found = await client.queue.stats()
    if as_json:
        output.print_json(found)
        return Status.OK
    console = output.stdout()
    depths = {f"waiting, {priority}": depth for priority, depth in found["waiting"].items()}
    sizes = {name: found[name] for name in ("delayed", "completions")}
    dead = Text(str(found["dead"]), "red" if found["dead"] else "default")
    console.print(output.facts_grid({**depths, **sizes, "dead letters": dead, **found["counters"]}))
    console.print()
    if not any(record["live"] for record in found["consumers"]):
        console.print(Text("no consumer lives", "yellow"))
    if found["consumers"]:
        columns = ("consumer", "heartbeat", "gpu", "state", "job")
        console.print(output.table(columns, map(_consumer, found["consumers"])))
    return Status.OK


def _consumer(record: dict[str, Any]) -> tuple[object, ...]:
    ago_s = max(0.0, datetime.now(UTC).timestamp() - record["last_heartbeat_ms"] / 1000)
    state = record.get("state", "")
    if not record["live"] and state != "failed":  # one that failed has said its last word
        state = "silent"
    return record["name"], f"{ago_s:.0f} s ago", record.get("gpu", ""), output.state_text(state), record.get("job", "")


def _facts(found: JobStatus) -> dict[str, object]:
    facts: dict[str, object] = {
        "job": found.job_id,
        "state": output.state_text(found.state),
        "run": found.run,
        "attempt": found.attempt,
        "priority": found.priority,
        "consumer": found.consumer,
        "submitted": output.time_text(found.submitted_at),
        "ended": output.time_text(found.ended_at) or None,
    }
    match found.event:
        case SucceededEvent(data=data):
            facts |= {"image": data.image_url, "key": data.image_key, "seed": data.metadata.seed_used}
            facts |= {"seconds": data.timings.total, "warnings": "; ".join(data.warnings) or None}
        case FailedEvent(data=data):
            facts |= {"error": data.error, "code": data.error_code, "retry after": retry_advice(data.retry_after)}
    return facts


def _document(found: JobStatus) -> dict[str, Any]:
    return {
        **asdict(found),
        "submitted_at": found.submitted_at.isoformat(),
        "ended_at": found.ended_at.isoformat() if found.ended_at else None,
        "event": found.event.model_dump(mode="json") if found.event else None,
    }


def retry_advice(retry_after: int | None) -> str:
    """What `retry_after` of a failed event means."""
    if retry_after is None:
        return "never as it is"
    return "at once" if retry_after == 0 else f"{retry_after} s"
