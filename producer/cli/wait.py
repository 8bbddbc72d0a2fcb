"""`wait`: follows jobs to their ends."""

import asyncio
from contextlib import aclosing
from typing import Annotated

import typer
from redis.exceptions import RedisError
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from producer.async_client import AsyncGenerationClient
from producer.cli import output
from producer.cli.command import AsJson, Status, explain, open_client, tell
from producer.cli.jobs import retry_advice
from producer.errors import JobUnknown, ProducerError, WaitTimeout
from producer.jobs import Progress
from schemas.events import CancelledEvent, EventError, FailedEvent, SucceededEvent, TerminalEvent

_LOOK_S = 1.0

JobIds = Annotated[list[str], typer.Argument(metavar="JOB_ID...")]
WaitSeconds = Annotated[float | None, typer.Option("--timeout", min=0, help="Give up after so many seconds.")]


async def wait(job_ids: JobIds, timeout_s: WaitSeconds = None, as_json: AsJson = False) -> Status:
    """Wait until the jobs have ended. Prints a line for each, or its event with --json."""
    async with open_client() as client:
        return await wait_for(client, job_ids, timeout_s=timeout_s, as_json=as_json)


async def wait_for(
    client: AsyncGenerationClient, job_ids: list[str], *, timeout_s: float | None, as_json: bool
) -> Status:
    """Follows all of the jobs at once; the worst of their ends is the status."""
    with Board(as_json=as_json) as board:
        looking = asyncio.create_task(_show_states(client, board))
        try:
            unique = dict.fromkeys(job_ids)
            ends = await asyncio.gather(*(_follow(client, job_id, board, timeout_s) for job_id in unique))
        finally:
            looking.cancel()
    return max(ends)


class Board:
    """A bar for each job on a terminal, and a line on stdout for each end."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._console = output.stdout()
        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            TextColumn("{task.fields[state]:<10}", style="cyan", markup=False),
            BarColumn(),
            TextColumn("{task.fields[steps]}", style="green", markup=False),
            TextColumn("{task.fields[left]}", style="dim", markup=False),
            console=self._console,
            transient=True,
            disable=as_json or not self._console.is_terminal,
        )
        self._rows: dict[str, TaskID] = {}
        self._width = 0

    def __enter__(self) -> "Board":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    @property
    def undrawn(self) -> list[str]:
        """The jobs on a terminal that show no step yet."""
        if self._bars.disable:
            return []
        started = {task.id for task in self._bars.tasks if task.total is not None}
        return [job_id for job_id, row in self._rows.items() if row not in started]

    def add(self, job_id: str) -> None:
        self._width = max(self._width, len(job_id))
        self._rows[job_id] = self._bars.add_task(output.visible(job_id), total=None, state="", steps="", left="")

    def state(self, job_id: str, state: str) -> None:
        if job_id in self._rows:
            self._bars.update(self._rows[job_id], state=state)

    def step(self, job_id: str, progress: Progress) -> None:
        self._bars.update(
            self._rows[job_id],
            completed=progress.step,
            total=progress.total,
            state="running",
            steps=f"{progress.step}/{progress.total}",
            left=f"{progress.eta_s:.0f} s left",
        )

    def end(self, job_id: str, event: TerminalEvent) -> None:
        self._bars.remove_task(self._rows.pop(job_id))
        if self._as_json:
            output.print_json(event.model_dump(mode="json"), lines=True)
        else:
            self._console.print(_line(event, self._width), soft_wrap=True)

    def give_up(self, job_id: str, error: ProducerError) -> Status:
        self._bars.remove_task(self._rows.pop(job_id))
        return tell(error, as_json=self._as_json)


async def _follow(client: AsyncGenerationClient, job_id: str, board: Board, timeout_s: float | None) -> Status:
    board.add(job_id)
    deadline = asyncio.timeout(timeout_s)
    try:
        async with deadline, aclosing(client.events(job_id)) as items:
            async for item in items:
                if not isinstance(item, Progress):
                    board.end(job_id, item)
                    return Status.OK if isinstance(item, SucceededEvent) else Status.FAILED
                board.step(job_id, item)
    except TimeoutError:
        message = f"the job {job_id} has not ended within {timeout_s:g} s"
        return board.give_up(job_id, WaitTimeout(message, job_id=job_id, retry_after=0, details={"limit": "total"}))
    except JobUnknown as error:
        return board.give_up(job_id, error)
    except EventError as error:
        message = f"the job {job_id}: {explain(error)}"
        return board.give_up(job_id, ProducerError(message, job_id=job_id))
    raise AssertionError("a job's events end with a terminal one")


async def _show_states(client: AsyncGenerationClient, board: Board) -> None:
    while True:
        for job_id in board.undrawn:
            try:
                board.state(job_id, (await client.status(job_id)).state)
            except (JobUnknown, RedisError):
                continue  # whoever follows the job tells of it
        await asyncio.sleep(_LOOK_S)


def _line(event: TerminalEvent, width: int) -> Text:
    line = Text(event.data.job_id.ljust(width) + "  ")
    match event:
        case SucceededEvent(data=data):
            line.append_text(output.state_text("succeeded"))
            line.append("  " + output.visible(data.image_url or data.image_key or data.image_sha256))
            line.append(f"  {data.timings.total:.1f} s", "dim")
        case FailedEvent(data=data):
            line.append_text(output.state_text("failed"))
            line.append(f"  {data.error_code}", "bold")
            line.append("  " + output.visible(data.error))
            line.append(f"  (retry: {retry_advice(data.retry_after)})", "dim")
        case CancelledEvent(data=data):
            line.append_text(output.state_text("cancelled"))
            line.append(f"  while {data.stage}", "dim")
    return line
