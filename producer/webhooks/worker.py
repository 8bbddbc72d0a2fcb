"""The RQ worker of webhooks, and the sweeper that brings RQ and our rows together again after crashes."""

import logging
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import structlog
from redis import RedisError
from rq import Queue, Worker
from rq.exceptions import StopRequested
from rq.job import Job
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from producer.tables import GAVE_UP, PENDING
from producer.webhooks import delivery  # here rather than in each fork
from producer.webhooks.queue import WebhookQueue
from producer.webhooks.rows import Deliveries
from schemas.redact import redact_text, redact_value

log = structlog.get_logger(__name__)

SWEEP_EVERY_S = 15
GRACE_S = 30.0
_AT_ONCE = 1000
_ASK_AGAIN_S = 1.0
_RQ_HEADROOM_S = 15  # RQ waits for jobs this much less than `worker_ttl`


class Sweeper:
    """Puts back what RQ has lost or given up on its own, and takes out of its failed registry what has not failed.

    The row is right. A delivery whose listener died before it was enqueued, whose process was killed, or that a Redis
    has forgotten is pending in its row, and goes on when its next attempt is due.
    """

    def __init__(self, queue: WebhookQueue, rows: Deliveries, *, grace_s: float = GRACE_S) -> None:
        self._queue = queue
        self._rows = rows
        self._grace_s = grace_s
        self._agreed: set[str] = set()

    def sweep(self) -> int:
        """Returns how many deliveries were put back. Raises redis.RedisError, sqlalchemy.exc.SQLAlchemyError."""
        return self._reconcile_failed() + self._put_back_lost()

    def _reconcile_failed(self) -> int:
        failed = self._queue.failed_ids()
        self._agreed &= failed
        news = self._queue.events_of(sorted(failed - self._agreed)[:_AT_ONCE])
        rows = {row.event_id: row for row in self._rows.among(list(news.values()))}
        put_back = 0
        for job_id, event_id in news.items():
            row = rows.get(event_id)
            if row is not None and row.state == GAVE_UP:
                self._agreed.add(job_id)
            elif row is not None and row.state == PENDING:
                self._queue.put_back(event_id, row.due_at)
                log.warning("webhook.put_back", event_id=event_id, why="its process died")
                put_back += 1
            else:
                self._queue.discard(event_id)
        return put_back

    def _put_back_lost(self) -> int:
        lost = self._queue.lost(self._rows.overdue(self._grace_s, _AT_ONCE))
        for row in self._rows.among(lost):
            self._queue.put_back(row.event_id, row.due_at)
            log.warning("webhook.put_back", event_id=row.event_id, why="it was not enqueued")
        return len(lost)


class WebhookWorker(Worker):
    """RQ's worker, which forks for each job, with a sweep among its own maintenance, all in the main process."""

    def __init__(self, queue: WebhookQueue, engine: Engine) -> None:
        super().__init__(
            [queue.rq],
            connection=queue.rq.connection,
            serializer=queue.rq.serializer,
            maintenance_interval=SWEEP_EVERY_S,
            worker_ttl=SWEEP_EVERY_S + _RQ_HEADROOM_S,
            log_job_description=False,
        )
        self.was_asked_to_stop = False
        self.failure: Exception | None = None
        self._is_interruptible = False
        self._was_signalled = False
        self._engine = engine
        self._sweeper = Sweeper(queue, Deliveries(engine))

    def run_maintenance_tasks(self) -> None:
        self._is_interruptible = False  # RQ stops by an exception out of the signal's handler, which SQLAlchemy wraps
        upkeep: Callable[[], None] = super().run_maintenance_tasks  # RQ gives it no types
        upkeep()
        try:
            self._sweeper.sweep()
        except SQLAlchemyError as error:
            log.warning("webhook.no_database", error=redact_value(error))
        except Exception as error:
            self.failure = error  # RQ logs it, and ends as if nothing were wrong
            raise
        finally:
            self._engine.dispose()  # a fork must not inherit a connection
        self._heed_signals()

    def listen_to_signals(self) -> None:
        """From now on; one that comes before RQ's loop runs is heeded there.

        The exception that RQ stops by would leave its scheduler orphaned, or its thread for commands half made.
        """
        own_process = os.getpid()
        request_stop: Callable[..., None] = self.request_stop

        def stop(number: int, frame: FrameType | None) -> None:
            if os.getpid() != own_process:
                os._exit(0)  # a fork that RQ has not yet given its own handlers has done nothing yet either
            if self._is_interruptible:
                request_stop(number, frame)
            else:
                self._was_signalled = True

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)

    def check_for_suspension(self, burst: bool) -> None:
        """What RQ's loop calls first, and in each round."""
        self._heed_signals()
        check: Callable[[bool], None] = super().check_for_suspension
        check(burst)

    def _heed_signals(self) -> None:
        self._is_interruptible = True
        if self._was_signalled or self._stop_requested:  # or the exception was lost in a place that swallows them
            self.handle_warm_shutdown_request()
            raise StopRequested

    def _install_signal_handlers(self) -> None:
        """RQ's own would replace those above."""

    def stop_scheduler(self) -> None:
        """RQ asks once; a signal that meets a process in the middle of its fork is lost."""
        process = None if self.scheduler is None else self.scheduler._process
        while process is not None and process.is_alive():
            process.terminate()
            process.join(_ASK_AGAIN_S)

    def handle_warm_shutdown_request(self) -> None:
        self.was_asked_to_stop = True
        self._stop_requested = True  # should a library swallow the exception that RQ raises next

    def handle_exception(self, job: Job, *exc_info: object) -> None:
        if not isinstance(exc_info[1], delivery.DeliveryFailed):  # that one is in the log already
            super().handle_exception(job, *exc_info)

    def handle_job_failure(self, job: Job, queue: Queue, *args: Any, exc_string: str = "", **options: Any) -> None:
        """RQ keeps the traceback in Redis for a year."""
        handle: Callable[..., None] = super().handle_job_failure
        handle(job, queue, *args, exc_string=redact_text(exc_string), **options)


class _ToStructlog(logging.Handler):
    """What RQ logs goes where our own log goes."""

    def emit(self, record: logging.LogRecord) -> None:
        log.log(record.levelno, "rq", message=record.getMessage())


def work(queue: WebhookQueue, engine: Engine, *, burst: bool) -> None:
    """Delivers webhooks until SIGTERM or SIGINT (the attempt at hand is finished); with `burst`, until nothing is due.

    Raises redis.RedisError where an outage has ended it: whoever watches over processes starts it again.
    """
    logger = logging.getLogger("rq")
    logger.handlers = [_ToStructlog()]
    logger.propagate = False
    worker = WebhookWorker(queue, engine)
    worker.listen_to_signals()
    try:
        worker.work(burst=burst, with_scheduler=True, logging_level="WARNING")
    except StopRequested:
        leave: Callable[[], None] = worker.teardown
        leave()
    if worker.failure is not None:
        raise worker.failure
    if not (burst or worker.was_asked_to_stop):
        raise RedisError("the worker lost it")
