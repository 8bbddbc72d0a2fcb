"""`listen`: stores what consumers publish."""

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Annotated

import typer
from rich.text import Text

from producer.cli import output
from producer.cli.command import AsJson, BadUsage, Status, checked_settings
from producer.listener import Listener, from_settings
from schemas.events import Event, FailedEvent, RetryingEvent, SucceededEvent
from schemas.keys import DEFAULT_LISTENER_GROUP

Group = Annotated[str, typer.Option(metavar="NAME", help="Every group gets every event.")]
Once = Annotated[bool, typer.Option("--once", help="Store what there is, and end.")]
DropGroup = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Forget a group that nobody reads any more: it holds the stream's end."),
]


async def listen(
    group: Group = DEFAULT_LISTENER_GROUP, once: Once = False, drop_group: DropGroup = None, as_json: AsJson = False
) -> Status:
    """Store events in the database until a signal comes, and print a line for each."""
    async with AsyncExitStack() as stack:
        with checked_settings() as settings:
            listener = await stack.enter_async_context(from_settings(settings, group))
        if drop_group is not None:
            return await _drop(listener, drop_group, as_json=as_json)
        stop = asyncio.Event()
        listener.on()(_while_read(_print_json if as_json else _print_line, stop))
        if once:
            await listener.catch_up(stop)
        else:
            await _until_signal(listener, stop)
    return Status.OK


def _while_read(show: Callable[[Event], None], stop: asyncio.Event) -> Callable[[Event], Awaitable[None]]:
    """`show` as a handler that sets `stop` when nobody reads stdout any more."""

    async def handler(event: Event) -> None:
        try:
            show(event)
        except BrokenPipeError:
            stop.set()
            nowhere = os.open(os.devnull, os.O_WRONLY)  # for what is still buffered, and the rest of the batch
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)

    return handler


async def _until_signal(listener: Listener, stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await listener.run(stop)


async def _drop(listener: Listener, name: str, *, as_json: bool) -> Status:
    if not await listener.completions.drop_group(name):
        raise BadUsage(f"there is no group {name}")
    if as_json:
        output.print_json({"dropped": name})
    else:
        output.stdout().print(f"dropped the group {output.visible(name)}", soft_wrap=True)
    return Status.OK


def _print_json(event: Event) -> None:
    output.print_json(event.model_dump(mode="json"), lines=True)


def _print_line(event: Event) -> None:
    kind = event.type.removeprefix("generation.")
    line = Text(output.time_text(event.timestamp), "dim").append("  ", "default")
    line.append(f"{output.visible(event.data.job_id)}  ", "not dim").append_text(output.state_text(kind))
    match event:
        case SucceededEvent(data=data):
            line.append(f"  {output.visible(data.image_url or data.image_key or data.image_sha256)}", "not dim")
        case FailedEvent(data=data) | RetryingEvent(data=data):
            line.append(f"  {data.error_code}  {output.visible(data.error)}", "not dim")
    output.print_line(line)
