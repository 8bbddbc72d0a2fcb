"""The demo from its start to its last line."""

import asyncio
import os
import shutil
import signal
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import structlog
from botocore.exceptions import ClientError
from redis.exceptions import RedisError

from demo.checks import check_distinct, check_end, check_secrets, check_stored
from demo.gallery import Totals, render
from demo.jobs import EndedJob, plan
from demo.servers import ServerFailed
from demo.stack import BUCKET, CONSUMER_LOG, DATABASE, Interrupted, Stack, open_stack
from demo.tour import run_jobs
from producer.cli import output
from producer.database import open_engine
from producer.errors import ProducerError
from producer.store import Store
from schemas.events import FailedEvent, SucceededEvent, TerminalEvent
from schemas.redact import redact_value

_BACKEND_LOG = "backend.log"
_INTERRUPTED = 128 + signal.SIGINT


def run(out: Path, gallery: Path, *, only: Collection[str] | None = None, stop: Event | None = None) -> int:
    """Runs the planned jobs, or those of them whose ids are in `only`. Empties `out`; writes there and to `gallery`.

    Returns the exit status: 0 only if everything went as planned. Once `stop` is set, everything is ended.
    """
    started = time.monotonic()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    try:
        with _backend_logs_to(out / _BACKEND_LOG), open_stack(out, _say, stop or Event()) as stack:
            ends = _see_through(stack, only)
    except Interrupted:
        return _INTERRUPTED
    except (ServerFailed, ProducerError, RedisError) as error:
        sys.stderr.writelines(f"{output.visible(line)}\n" for line in str(error).splitlines())
        return 1
    problems = _problems(out, ends, stack.credentials)
    took_s = time.monotonic() - started
    page = render(ends, Totals(took_s, problems))
    gallery.write_text(page, encoding="utf-8")
    problems += check_secrets([("the gallery", page.encode())], stack.credentials)
    for problem in problems:
        _say(f"not as planned: {problem}")
    _say(_summary(ends, problems, took_s, gallery))
    return 1 if problems else 0


def _see_through(stack: Stack, only: Collection[str] | None) -> list[EndedJob]:
    jobs = [job for job in plan(stack.urls) if only is None or job.job_id in only]
    events = asyncio.run(run_jobs(stack, jobs, _say))
    pictures = _pictures(stack, events)
    return [EndedJob(job, events.get(job.job_id), pictures.get(job.job_id)) for job in jobs]


def _pictures(stack: Stack, events: Mapping[str, TerminalEvent]) -> dict[str, bytes]:
    """The stored PNGs by job; what is not there is left out."""
    pictures = {}
    client = stack.s3.client()
    try:
        for job_id, event in events.items():
            if isinstance(event, SucceededEvent):
                key = event.data.image_key or stack.urls.owns(event.data.image_url or "") or "-"
                try:
                    pictures[job_id] = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
                except ClientError:
                    continue
    finally:
        client.close()
    return pictures


def _problems(out: Path, ends: Sequence[EndedJob], credentials: Sequence[str]) -> list[str]:
    """Looks at everything that the demo has left behind, once nothing runs any more."""
    problems = [problem for ended in ends for problem in check_end(ended)]
    engine = open_engine(f"sqlite:///{out / DATABASE}")
    store = Store(engine)
    try:
        for ended in ends:
            job_id = ended.job.job_id
            problems += check_stored(ended, store.job(job_id), store.image(job_id))
    finally:
        engine.dispose()
    kept = [out / CONSUMER_LOG, out / _BACKEND_LOG, *out.glob(f"{DATABASE}*")]
    problems += check_distinct(ends)
    problems += check_secrets(((file.name, file.read_bytes()) for file in kept), credentials)
    return problems


def _summary(ends: Sequence[EndedJob], problems: Sequence[str], took_s: float, gallery: Path) -> str:
    pictures = sum(isinstance(ended.event, SucceededEvent) for ended in ends)
    failures = sum(isinstance(ended.event, FailedEvent) for ended in ends)
    outcome = f"{failures} refused as planned" if not problems else f"{failures} failed, {len(problems)} not as planned"
    return f"{len(ends)} jobs: {pictures} pictures, {outcome}; {took_s:.1f} s; open {os.path.relpath(gallery)}"


def _say(line: str) -> None:
    output.stdout().print(output.visible(line), soft_wrap=True)


@contextmanager
def _backend_logs_to(path: Path) -> Iterator[None]:
    """What the client and the listener log goes to a file, as long as the block runs."""
    with path.open("w", encoding="utf-8") as file:
        structlog.configure(
            processors=[
                structlog.contextvars.merge_contextvars,
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                lambda _logger, _method, event: redact_value(event),
                structlog.processors.JSONRenderer(),
            ],
            logger_factory=structlog.WriteLoggerFactory(file=file),
        )
        try:
            yield
        finally:
            structlog.reset_defaults()
