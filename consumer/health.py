"""Whether this consumer may go on: one that draws nothing but failures leaves its jobs to others, and its place."""

from collections.abc import Iterator
from contextlib import contextmanager

from redis.exceptions import RedisError

from consumer.errors import (
    GenerationFailed,
    GpuOutOfMemory,
    HandedBack,
    JobCancelled,
    LeaseLost,
    ModelBroken,
    WeightsChanged,
    WorkerError,
)

FAILURES_IN_A_ROW = 3
_NOT_OURS = (LeaseLost, JobCancelled, HandedBack, RedisError)


class Health:
    """Watches the steps that need this machine's GPU and memory. `broken` says why it can draw no more."""

    def __init__(self) -> None:
        self.broken: ModelBroken | None = None
        self._failed: set[str] = set()

    @contextmanager
    def watching(self, job_id: str) -> Iterator[None]:
        """Notes how the block ends."""
        try:
            yield
        except Exception as error:
            self._note(job_id, error)
            raise

    def drew(self) -> None:
        """A picture is made: whatever failed before, the failures were the jobs' own."""
        self._failed.clear()

    def _note(self, job_id: str, error: Exception) -> None:
        if isinstance(error, ModelBroken):
            self.broken = error
        elif _is_suspect(error):
            self._failed.add(job_id)
            if len(self._failed) >= FAILURES_IN_A_ROW:
                self.broken = ModelBroken(f"{len(self._failed)} jobs in a row have failed, the last with: {error}")


def _is_suspect(error: Exception) -> bool:
    """Whether the failure may be this consumer's: what storage, LoRA files and callers do wrong is not."""
    if isinstance(error, WorkerError):
        return isinstance(error, GenerationFailed | WeightsChanged | GpuOutOfMemory)
    return not isinstance(error, _NOT_OURS)
