"""uvicorn with our limits, our log, and an end that leaves no caller without an answer."""

import asyncio
import copy
import logging
import re
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.config import LOGGING_CONFIG
from uvicorn.logging import AccessFormatter, DefaultFormatter

from schemas.redact import redact_text

_FINISH_S = 5.0  # container platforms kill after ten
_ANSWER_S = 3
_KEEP_ALIVE_S = 75  # longer than a proxy keeps a connection that it may use again
_QUERY = re.compile(r"\?\S*")


class RedactedLine(DefaultFormatter):
    """A line of uvicorn's log, its traceback included, without anything secret."""

    def format(self, record: logging.LogRecord) -> str:
        return redact_text(super().format(record))


class AccessLine(AccessFormatter):
    """A line of uvicorn's log of calls, without the queries of their paths."""

    def format(self, record: logging.LogRecord) -> str:
        return _QUERY.sub("", super().format(record))


class _Server(uvicorn.Server):
    """Ends on a signal: what is under way may go on for `_FINISH_S` seconds, and is then told to `close`."""

    def __init__(self, config: uvicorn.Config, when_ready: Callable[[], None], close: Callable[[], None]) -> None:
        super().__init__(config)
        self._when_ready = when_ready
        self._close = close

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()  # uvicorn's own way has the process die of the signal after all
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._when_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(_FINISH_S, self._close)
        await super().shutdown(sockets)


async def run(app: FastAPI, listening: socket.socket, when_ready: Callable[[], None]) -> None:
    """Serves on a socket that listens, until SIGINT or SIGTERM. `when_ready` is called once it does."""
    config = uvicorn.Config(
        app,
        log_config=_log_config(),
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=round(_FINISH_S) + _ANSWER_S,
    )

    def close() -> None:
        app.state.gateway.closing.set()  # known once the application has started

    await _Server(config, when_ready, close).serve([listening])


def _log_config() -> dict[str, Any]:
    """uvicorn's own, on stderr and redacted."""
    config: dict[str, Any] = copy.deepcopy(LOGGING_CONFIG)
    config["formatters"]["default"]["()"] = RedactedLine
    config["formatters"]["access"]["()"] = AccessLine
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    return config
