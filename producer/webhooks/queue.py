"""The RQ queue of webhooks: one job per event, under an id made from it, as JSON."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from redis import Redis
from rq import Queue
from rq.exceptions import DuplicateJobError
from rq.job import Job
from rq.serializers import JSONSerializer

JOB_FUNCTION = "producer.webhooks.delivery.deliver"
_JOB_TIMEOUT_S = 60  # above the request's own deadline: something else hangs


class WebhookQueue:
    """The queue `<prefix>-webhooks`. Nothing connects before the first call.

    The calls block, and raise redis.RedisError. Raises ValueError, without the URL, where it is none of a Redis.
    """

    def __init__(self, redis_url: str, prefix: str) -> None:
        self._prefix = prefix
        self._redis = _connect(redis_url)
        self.rq = Queue(f"{prefix}-webhooks", connection=self._redis, serializer=JSONSerializer)

    def close(self) -> None:
        """Closes the connections."""
        self._redis.close()

    def enqueue(self, event_ids: Sequence[str]) -> None:
        """Has these events delivered. One that RQ knows already, in whatever state, stays as it is."""
        for event_id in event_ids:
            self._add(event_id, None)

    def put_back(self, event_id: str, due_at: datetime) -> None:
        """Has an event delivered at `due_at`, whatever RQ knows of it: out of the failed registry too."""
        self.discard(event_id)
        self._add(event_id, due_at)

    def discard(self, event_id: str) -> None:
        """Forgets an event."""
        job = self.rq.fetch_job(self.job_id(event_id))
        if job is not None:
            self._delete(job)
        self._redis.delete(Job.key_for(self.job_id(event_id)))  # a remnant that is no job any more

    def lost(self, event_ids: Iterable[str]) -> list[str]:
        """Those that are in none of RQ's places from which a job goes on: queued, started, scheduled."""
        held = self._held()
        return [event_id for event_id in event_ids if self.job_id(event_id) not in held]

    def failed_ids(self) -> set[str]:
        """RQ's ids of the jobs in its failed registry."""
        return set(self.rq.failed_job_registry.get_job_ids(cleanup=False))

    def events_of(self, job_ids: Sequence[str]) -> dict[str, str]:
        """The event ids of RQ's jobs, by job id; those that are gone are left out."""
        jobs = Job.fetch_many(job_ids, connection=self._redis, serializer=JSONSerializer)
        return {job.id: str(job.args[0]) for job in jobs if job is not None}

    def job_id(self, event_id: str) -> str:
        """RQ's id of an event's job. All queues of a Redis share these ids, so the prefix is part of it."""
        return hashlib.sha256(f"{self._prefix}:{event_id}".encode()).hexdigest()[:40]

    def _held(self) -> set[str]:
        # In one transaction: a job that moves is seen where it was or where it is.
        with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.lrange(self.rq.key, 0, -1)
            pipeline.lrange(self.rq.intermediate_queue_key, 0, -1)
            pipeline.zrange(self.rq.scheduled_job_registry.key, 0, -1)
            pipeline.zrange(self.rq.started_job_registry.key, 0, -1)
            queued, taken, scheduled, started = pipeline.execute()
        executions = (execution.decode().partition(":")[0] for execution in started)
        return {job_id.decode() for job_id in (*queued, *taken, *scheduled)} | set(executions)

    def _delete(self, job: Job) -> None:
        try:
            job.delete()
        except ValueError:
            # RQ keeps the name of an execution for a minute longer than the execution, and fails between the two.
            job.execution_registry.cleanup(math.inf)
            job.delete()

    def _add(self, event_id: str, due_at: datetime | None) -> None:
        options = {
            "job_id": self.job_id(event_id),
            "unique": True,
            "description": event_id,
            "job_timeout": _JOB_TIMEOUT_S,
            "result_ttl": 0,  # what became of it is in our own row
        }
        try:
            if due_at is None or due_at <= datetime.now(UTC):
                self.rq.enqueue(JOB_FUNCTION, event_id, **options)
            else:
                self.rq.enqueue_at(due_at, JOB_FUNCTION, event_id, **options)
        except DuplicateJobError:
            return


def _connect(url: str) -> Redis:
    try:
        redis = Redis.from_url(url)
        pool = redis.connection_pool
        pool.connection_kwargs["decode_responses"] = False  # which other programs may like to have in the URL
        pool.connection_class(**pool.connection_kwargs)  # without a network: does it know the URL's options?
    except (ValueError, TypeError, AttributeError):
        raise ValueError("not the URL of a Redis: redis://, rediss:// or unix://, with known options") from None
    return redis
