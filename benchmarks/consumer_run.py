"""One run of the real consumer: its process, its jobs by the wire, and what its events and its log say afterwards."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from redis import Redis

from benchmarks.spread import spread
from demo.servers import shell_environment
from producer.client import GenerationClient
from producer.settings import ProducerSettings
from schemas.events import EVENT, SucceededEvent, Timings
from schemas.keys import Keys
from schemas.requests import GenerationRequest

START_TIMEOUT_S = 300.0
JOB_TIMEOUT_S = 300.0
RAMP_UP = 3
_STOP_TIMEOUT_S = 40.0


class RunFailed(Exception):
    """The consumer ended, or a job did not succeed."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A job's success, and when it was published: seconds by Redis' clock."""

    at_s: float
    event: SucceededEvent


@dataclass(frozen=True, slots=True)
class Run:
    """What one run brought: events in the order of their publication, and the GPU's waits by job."""

    started_s: float
    stored: Sequence[Stored]
    waits: Mapping[str, tuple[float, float]]

    def summary(self) -> dict[str, Any]:
        """Figures of the steady part: all but the first three jobs, which nothing was prepared for."""
        steady = self.stored[min(RAMP_UP, len(self.stored) // 3) :]
        took_s = steady[-1].at_s - steady[0].at_s
        return {
            "jobs": len(self.stored),
            "start_s": round(self.started_s, 3),
            "images_per_s": round((len(steady) - 1) / took_s, 4) if took_s else None,
            "job_to_job_s": spread([later.at_s - one.at_s for one, later in pairwise(steady)]),
            "gpu_s": spread([one.event.data.gpu_seconds for one in steady]),
            **self._idle([one.event for one in steady]),
            "latency_s": {name: spread([one[name] for one in _timings(steady)]) for name in Timings.model_fields},
        }

    def _idle(self, steady: Sequence[SucceededEvent]) -> dict[str, Any]:
        waited = [(event, *self.waits[event.data.job_id]) for event in steady if event.data.job_id in self.waits]
        idle_s = sum(gap_s for _, gap_s, _ in waited)
        busy_s = sum(event.data.gpu_seconds for event, *_ in waited)
        return {
            "gpu_idle_percent": round(100 * idle_s / (idle_s + busy_s), 3) if waited else None,
            "gpu_gap_ms": spread([1000 * gap_s for _, gap_s, _ in waited], digits=2),
            "gpu_handover_ms": spread([1000 * handover_s for *_, handover_s in waited], digits=2),
        }


def _timings(steady: Sequence[Stored]) -> list[dict[str, float]]:
    return [one.event.data.timings.model_dump() for one in steady]


@contextmanager
def consumer_process(
    environment: Mapping[str, str], log: Path, module: Sequence[str]
) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m` of `module` with these settings and no others; it drains when the block ends."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *module],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**shell_environment(), **environment},
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run_consumer(
    environment: Mapping[str, str],
    requests: Sequence[GenerationRequest],
    log: Path,
    module: Sequence[str] = ("consumer",),
) -> Run:
    """Starts a consumer, gives it all jobs at once when it is ready, and waits for the last of them.

    Raises RunFailed.
    """
    settings = ProducerSettings.model_validate(environment)
    keys = Keys(settings.prefix)
    began = time.perf_counter()
    with (
        Redis.from_url(settings.redis_url.get_secret_value()) as redis,
        GenerationClient.from_settings(settings) as client,
        consumer_process(environment, log, module) as process,
    ):
        _await_life(redis, keys, process, log)
        started_s = time.perf_counter() - began
        for outcome in client.submit_many(requests):
            if isinstance(outcome, Exception):
                raise outcome
        stored = list(_successes(redis, keys, len(requests), process, log))
    return Run(started_s, stored, _waits(log))


def _await_life(redis: "Redis", keys: Keys, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not redis.zcard(keys.consumers):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RunFailed(f"the consumer did not start:\n{_tail(log)}")
        time.sleep(0.01)


def _successes(redis: "Redis", keys: Keys, count: int, process: subprocess.Popen[bytes], log: Path) -> Iterator[Stored]:
    last: bytes = b"0"
    deadline = time.monotonic() + JOB_TIMEOUT_S
    while count:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RunFailed(f"the consumer ended, or came no further:\n{_tail(log)}")
        reply: Any = redis.xread({keys.completions: last}, block=200) or {}
        for _, entries in reply.items() if isinstance(reply, dict) else reply:
            for entry_id, fields in entries:
                last = entry_id
                event = EVENT.validate_json(fields[b"payload"])
                if event.type in ("generation.failed", "generation.retrying"):
                    raise RunFailed(f"{event.data.job_id}: {event.data.error}")
                if isinstance(event, SucceededEvent):
                    count -= 1
                    deadline = time.monotonic() + JOB_TIMEOUT_S
                    yield Stored(int(entry_id.split(b"-")[0]) / 1000, event)


def _waits(log: Path) -> dict[str, tuple[float, float]]:
    waits = {}
    for line in log.read_text(errors="replace").splitlines():
        if '"gpu.waited"' in line:
            said = json.loads(line)
            waits[said["job_id"]] = (said["ms"] / 1000, said["handover_ms"] / 1000)
    return waits


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]
