"""The limits of a wait: for the queue, for the run, and altogether."""

from producer.errors import WaitTimeout
from schemas.errors import ERROR_TABLE, ErrorCode

_TOO_LATE = {
    "queue": "has not got the GPU within {:g} s",
    "run": "has not ended within {:g} s on the GPU",
    "total": "has not ended within {:g} s",
}


class Limits:
    """Three clocks, in seconds of the event loop; None is no limit.

    The queue's clock goes until the job has the GPU for the first time, the run's from then on, through retries and
    their delays, too; the one for everything goes all the time.
    """

    def __init__(
        self, now_s: float, *, queue_timeout_s: float | None, run_timeout_s: float | None, timeout_s: float | None
    ) -> None:
        self._limits_s = {"queue": queue_timeout_s, "run": run_timeout_s, "total": timeout_s}
        self._since_s = {"queue": now_s, "total": now_s}

    def has_gpu(self, now_s: float) -> None:
        """The job has the GPU, perhaps not for the first time."""
        if self._since_s.pop("queue", None) is not None:
            self._since_s["run"] = now_s

    @property
    def next(self) -> tuple[float | None, str]:
        """When the next limit passes, None for never; and which it is: queue, run or total."""
        ends = [
            (since_s + limit_s, name)
            for name, since_s in self._since_s.items()
            if (limit_s := self._limits_s[name]) is not None
        ]
        return min(ends, default=(None, "total"))

    def passed(self, job_id: str, name: str) -> WaitTimeout:
        """The error for the limit `name` of this wait."""
        what = _TOO_LATE[name].format(self._limits_s[name])
        retry_after = ERROR_TABLE[ErrorCode.TIMEOUT].retry_after_s
        return WaitTimeout(f"the job {job_id} {what}", job_id=job_id, retry_after=retry_after, details={"limit": name})
