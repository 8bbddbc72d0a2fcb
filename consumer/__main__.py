"""`python -m consumer`: one consumer, until SIGTERM or until it has been idle for long enough."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

import structlog
from pydantic import ValidationError

from consumer import failpoints, logs
from consumer.bootstrap import consumer_name, load_engine, record_broken_model, wire
from consumer.engine import Engine
from consumer.errors import ModelBroken
from consumer.settings import ConsumerSettings

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

log = structlog.get_logger("consumer")


async def consume(settings: ConsumerSettings, load: Callable[[ConsumerSettings], Engine]) -> int:
    """Loads the model, works until told to stop, and returns the exit status: 0, or 1 where the model failed."""
    name = consumer_name()
    structlog.contextvars.bind_contextvars(consumer=name)
    try:
        engine = await asyncio.to_thread(load, settings)
    except ModelBroken as error:
        log.exception("model.broken", model=settings.model)
        await record_broken_model(settings, name, error)
        return 1
    async with wire(settings, engine, name) as worker:
        for number in _STOP_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, worker.request_stop)
        await worker.run()
    if worker.broken is None:
        return 0
    log.error("consumer.broken", error=str(worker.broken))
    await record_broken_model(settings, name, worker.broken)
    return 1


def main(load: Callable[[ConsumerSettings], Engine] = load_engine) -> NoReturn:
    """Runs one consumer with the engine that `load` brings, and ends the process with its exit status."""
    status = 1
    try:
        status = _main(load)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        # Python would first wait for its threads: one that hangs on the GPU would keep the platform from replacing us
        sys.stderr.flush()
        os._exit(status)


def _main(load: Callable[[ConsumerSettings], Engine]) -> int:
    logs.configure()
    try:
        settings = ConsumerSettings()
        failpoints.arm(os.environ.get(failpoints.VARIABLE, ""))
    except ValidationError as error:
        # pydantic's own text repeats the values
        for problem in error.errors(include_url=False, include_input=False, include_context=False):
            log.error("settings.invalid", variable=".".join(map(str, problem["loc"])), problem=problem["msg"])
        return 2
    for number in _STOP_SIGNALS:  # until the model is loaded nothing is held, and nothing has to be cleaned up
        signal.signal(number, lambda *_: os._exit(0))
    log.info("consumer.loading", model=settings.model, device=settings.device)
    return asyncio.new_event_loop().run_until_complete(consume(settings, load))


if __name__ == "__main__":
    main()
