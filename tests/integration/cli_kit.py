"""Runs commands in this process, against a Redis and a database of the test's own."""

import json
import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
from typer.testing import CliRunner

from demo.servers import RedisServer
from producer.cli.app import app
from schemas.keys import Keys
from tests.integration.client_kit import Ender, T, consume


class Cli:
    """`status`, `out` and `err` are those of the last command; a command's environment is `environment` alone."""

    def __init__(self, redis_url: str, keys: Keys, folder: Path) -> None:
        self.environment = {
            "REDIS_URL": redis_url,
            "SDXL_PREFIX": keys.prefix,
            "DATABASE_URL": f"sqlite:///{folder / 'events.db'}",
        }
        self.keys = keys
        self.status, self.out, self.err = 0, "", ""

    def run(self, *arguments: str, stdin: str | bytes | None = None, **environment: str) -> str:
        """Runs `python -m producer` with these arguments; returns its stdout."""
        result = CliRunner().invoke(app, arguments, input=stdin, env=self.environment | environment)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        self.status, self.out, self.err = result.exit_code, result.stdout, result.stderr
        return self.out

    def run_json(self, *arguments: str, **options: Any) -> Any:
        """The one document that the command prints with --json."""
        return json.loads(self.run(*arguments, "--json", **options))

    def consume(self, what: Callable[[Ender], Coroutine[Any, Any, T]]) -> T:
        return consume(self.environment["REDIS_URL"], self.keys, what)


@contextmanager
def a_cli(server: RedisServer, keys: Keys, folder: Path) -> Iterator[Cli]:
    """Commands whose database is in `folder`. They set up the log for themselves; it is as before afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith(("R2_", "SDXL_")):
                patch.delenv(name)
        try:
            yield Cli(server.url, keys, folder)
        finally:
            structlog.reset_defaults()
