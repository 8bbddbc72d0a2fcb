"""`python -m examples.backend serve`, and the parts of it as processes of their own."""

import asyncio
import signal
from typing import Annotated

import typer
import uvicorn

from examples.backend.app import create_app
from examples.backend.loops import run_listener, run_relay
from examples.backend.settings import BackendSettings
from examples.backend.tables import Avatar, Base, LoraModel, open_sessions

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def seed(lora_key: Annotated[str | None, typer.Option(help="A LoRA in the own bucket; none: no LoRA.")] = None) -> None:
    """Create the tables and the avatar `ann`, once. (A real backend has migrations, and people.)"""
    sessions = open_sessions(BackendSettings().database_url.get_secret_value())
    with sessions.begin() as session:
        Base.metadata.create_all(session.connection())
        ann = Avatar(id="ann", base_prompt="a portrait of a woman, soft light")
        if lora_key:
            ann.lora_model = LoraModel(id="ann-1", trigger_word="ann", key=lora_key, version="1")
        session.merge(ann)
    typer.echo("the avatar `ann` is there")


@app.command()
def serve(host: str = "127.0.0.1", port: int = 8080, loops: bool = True) -> None:
    """Answer HTTP; with --no-loops, relay and listener run elsewhere."""
    uvicorn.run(create_app(BackendSettings(), loops=loops), host=host, port=port)


@app.command()
def relay() -> None:
    """Publish what is in the outbox. Any signal may end it anywhere."""
    settings = BackendSettings()
    sessions = open_sessions(settings.database_url.get_secret_value())
    asyncio.run(run_relay(settings, sessions, asyncio.Event()))


@app.command()
def listen() -> None:
    """Store what the queue's events say, until a signal comes."""
    settings = BackendSettings()
    sessions = open_sessions(settings.database_url.get_secret_value())

    async def until_a_signal() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await run_listener(settings, sessions, stop)

    asyncio.run(until_a_signal())


if __name__ == "__main__":
    app()
