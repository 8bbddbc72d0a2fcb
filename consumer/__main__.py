"""`python -m consumer`: one consumer, until SIGTERM or until it has been idle for long enough."""

import asyncio
import os
import signal
import sys

import structlog
from pydantic import ValidationError

from consumer import logs
from consumer.bootstrap import consumer_name, load_engine, record_broken_model, wire
from consumer.errors import ModelBroken
from consumer.settings import ConsumerSettings

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

log = structlog.get_logger(__name__)


async def consume(settings: ConsumerSettings) -> int:
    """Loads the model, works until told to stop, and returns the exit status: 0, or 1 if the model did not load."""
    name = consumer_name()
    structlog.contextvars.bind_contextvars(consumer=name)
    loop = asyncio.get_running_loop()
    for number in _STOP_SIGNALS:  # while the model loads nothing is held, and a thread cannot be stopped
        loop.add_signal_handler(number, os._exit, 0)
    try:
        engine = await asyncio.to_thread(load_engine, settings)
    except ModelBroken as error:
        log.exception("model.broken", model=settings.model)
        await record_broken_model(settings, name, error)
        return 1
    async with wire(settings, engine, name) as worker:
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, worker.request_stop)
        await worker.run()
    return 0


def main() -> int:
    logs.configure()
    try:
        settings = ConsumerSettings()
    except ValidationError as error:
        # pydantic's own text repeats the values
        for problem in error.errors(include_url=False, include_input=False, include_context=False):
            log.error("settings.invalid", variable=".".join(map(str, problem["loc"])), problem=problem["msg"])
        return 2
    return asyncio.run(consume(settings))


if __name__ == "__main__":
    sys.exit(main())
