"""Every Redis key, stream field and group name, in one place.

All keys carry one hash tag, so that a script may touch any of them on a cluster.
"""

from dataclasses import dataclass
from enum import StrEnum

CONSUMER_GROUP = "consumers"
DEFAULT_LISTENER_GROUP = "listeners"
DEFAULT_PREFIX = "sdxl"
CANCEL_TTL_SECONDS = 604_800
PROGRESS_TTL_SECONDS = 3_600
PROGRESS_MAX_ENTRIES = 256
DEAD_MAX_ENTRIES = 100_000
ENDED_MAX_ENTRIES = 100
IDLE_NAME_MS = 3_600_000


class Priority(StrEnum):
    """The three request streams; the stream decides a job's priority."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


class JobState(StrEnum):
    """`state` of a job's hash."""

    QUEUED = "queued"
    PREPARING = "preparing"
    RUNNING = "running"
    DELAYED = "delayed"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        """Whether a run in this state has its one terminal event."""
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys under one prefix (`SDXL_PREFIX`)."""

    prefix: str = DEFAULT_PREFIX

    def _key(self, rest: str) -> str:
        return f"{{{self.prefix}}}:{rest}"

    def requests(self, priority: Priority) -> str:
        return self._key(f"requests:{priority}")

    @property
    def request_streams(self) -> list[str]:
        """The request streams, most urgent first."""
        return [self.requests(priority) for priority in Priority]

    def priority_of(self, stream: str) -> Priority:
        return Priority(stream.rsplit(":", 1)[1])

    @property
    def completions(self) -> str:
        return self._key("completions")

    @property
    def dead(self) -> str:
        return self._key("dead")

    @property
    def delayed(self) -> str:
        return self._key("delayed")

    def job(self, job_id: str) -> str:
        return self._key(f"job:{job_id}")

    def cancel(self, job_id: str) -> str:
        return self._key(f"cancel:{job_id}")

    def progress(self, job_id: str) -> str:
        return self._key(f"progress:{job_id}")

    def waiters(self, job_id: str) -> str:
        """Sorted set: the gateways' callers that wait for a job, by the end of their hold."""
        return self._key(f"waiters:{job_id}")

    @property
    def consumers(self) -> str:
        """Sorted set: consumer name by its last heartbeat, in milliseconds of the server's clock."""
        return self._key("consumers")

    def consumer(self, name: str) -> str:
        """Hash: what one consumer says of itself."""
        return self._key(f"consumers:{name}")

    @property
    def ended(self) -> str:
        """List: when the newest 100 runs ended, in milliseconds of the server's clock, the last one first."""
        return self._key("ended")

    @property
    def tenants(self) -> str:
        """Hash: how many unfinished runs of each tenant were submitted, without those of a bare XADD."""
        return self._key("tenants")

    def end_of_run(self, job_id: str) -> list[str]:
        """The keys that the end of a run changes, wherever the run was, in the order of `schemas.lua.END_RUN`."""
        return [
            *(self.job(job_id), self.cancel(job_id), self.progress(job_id)),
            *(self.completions, self.ended, self.tenants),
        ]

    @property
    def counters(self) -> str:
        """Hash: things that are counted but have no event, `duplicates` among them."""
        return self._key("counters")
