"""What all commands share: they run in an event loop, and end with a status and one line where they fail."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import wraps
from typing import Annotated, Any, ParamSpec

import typer
from botocore.exceptions import BotoCoreError, ClientError
from pydantic import ValidationError
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from producer.async_client import AsyncGenerationClient
from producer.cli import output
from producer.database import DatabaseRefused
from producer.errors import JobUnknown, ProducerError, RequestRefused
from producer.settings import ProducerSettings
from schemas import strict_json
from schemas.events import EventError
from schemas.redact import redact_text

P = ParamSpec("P")
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]


class Status(IntEnum):
    """Exit status of a command; of several, the greatest counts."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3


class BadUsage(Exception):
    """The command line or the environment asks for what cannot be done."""


_EXPECTED = (
    ProducerError,
    EventError,
    BadUsage,
    DatabaseRefused,
    RedisError,
    BotoCoreError,
    ClientError,
    SQLAlchemyError,
)


def command(function: Callable[P, Coroutine[Any, Any, Status]]) -> Callable[P, None]:
    """The synchronous command for typer: `function` in an event loop, its errors told and turned into a status."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> Status:
        return asyncio.run(function(*args, **kwargs))

    return blocking_command(run)


def blocking_command(function: Callable[P, Status]) -> Callable[P, None]:
    """The command for typer: `function`, its errors told and turned into a status."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            status = function(*args, **kwargs)
        except _EXPECTED as error:
            status = tell(error, as_json=bool(kwargs.get("as_json")))
        raise typer.Exit(status)

    return run


def tell(error: Exception, *, as_json: bool) -> Status:
    """Says in one line, or one JSON document, what went wrong. Returns the status that it means."""
    if as_json:
        output.print_json(error_document(error))
    else:
        output.complain(explain(error))
    return status_of(error)


def error_document(error: Exception) -> dict[str, Any]:
    """What a program wants to know of an error."""
    known: dict[str, Any] = {"kind": type(error).__name__, "message": explain(error)}
    if isinstance(error, ProducerError):
        known |= {"error_code": error.error_code, "retry_after": error.retry_after, "details": error.details}
        return {"job_id": error.job_id, "error": known}
    return {"error": known}


def explain(error: Exception) -> str:
    """One line for people, without anything secret."""
    match error:
        case ProducerError() | BadUsage():
            text = str(error)
        case DatabaseRefused():
            text = f"DATABASE_URL: {error}"
        case EventError():
            text = f"this version cannot read an event: {error}"
        case RedisError():
            text = f"Redis is out of reach or refuses: {error}"
        case SQLAlchemyError():
            text = f"the database is out of reach or refuses: {type(error).__name__}"  # its text has the statement
        case _:
            text = f"the storage is out of reach or refuses: {error}"
    return " ".join(redact_text(text).split())


def status_of(outcome: object) -> Status:
    """The exit status that an error means; OK for whatever is none."""
    match outcome:
        case RequestRefused() | JobUnknown() | BadUsage() | DatabaseRefused():
            return Status.USAGE
        case ProducerError() | EventError():
            return Status.FAILED
        case Exception():
            return Status.UNREACHABLE
        case _:
            return Status.OK


@contextmanager
def checked_settings() -> Iterator[ProducerSettings]:
    """The environment's settings, for what is built from them; what does not fit becomes BadUsage without its value."""
    try:
        yield ProducerSettings()
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        names = (f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in problems)
        raise BadUsage("; ".join(names)) from None
    except DatabaseRefused:
        raise
    except ValueError as error:
        raise BadUsage(f"REDIS_URL: {error}") from None


def open_client() -> AsyncGenerationClient:
    """A client as the environment says. Raises BadUsage."""
    with checked_settings() as settings:
        return AsyncGenerationClient.from_settings(settings)


def parse_json(text: str, option: str) -> Any:
    """The JSON that an option holds. Raises BadUsage."""
    try:
        return strict_json.loads(text.encode("utf-8", "surrogateescape"))
    except strict_json.StrictJsonError as error:
        raise BadUsage(f"{option}: {error}") from None
