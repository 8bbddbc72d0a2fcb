"""The RQ queue of webhooks on a real Redis, and the sweeper that keeps it and the rows together."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from redis import Redis
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer
from rq.utils import import_attribute
from sqlalchemy import Engine

from demo.servers import RedisServer
from producer.tables import DELIVERED, GAVE_UP, PENDING
from producer.webhooks import delivery
from producer.webhooks.queue import JOB_FUNCTION, WebhookQueue
from producer.webhooks.worker import GRACE_S, Sweeper
from schemas.keys import Keys
from tests import event_kit
from tests.integration.webhook_kit import Bench
from tests.s3_stub import S3Stub

URL = "https://hooks.example/sdxl"


@pytest.fixture
def queue(redis_at: RedisServer, keys: Keys) -> Iterator[WebhookQueue]:
    queue = WebhookQueue(redis_at.url, keys.prefix)
    yield queue
    queue.close()


@pytest.fixture
def bench(engine: Engine) -> Bench:
    return Bench(engine, S3Stub("http://127.0.0.1:1"))


@pytest.fixture
def sweeper(bench: Bench, queue: WebhookQueue) -> Sweeper:
    return Sweeper(queue, bench.rows)


def job(queue: WebhookQueue, event_id: str) -> Job | None:
    return queue.rq.fetch_job(queue.job_id(event_id))


def status_in_rq(queue: WebhookQueue, event_id: str) -> JobStatus | None:
    found = job(queue, event_id)
    return None if found is None else found.get_status()


def fail_in_rq(queue: WebhookQueue, event_id: str) -> None:
    """What RQ does with a job whose process died."""
    taken = queue.rq.dequeue_any([queue.rq], None, connection=queue.rq.connection, serializer=JSONSerializer)
    assert taken is not None
    assert taken[0].id == queue.job_id(event_id)
    taken[0].set_status(JobStatus.FAILED)
    queue.rq.failed_job_registry.add(taken[0], exc_string="killed")
    queue.rq.intermediate_queue.remove(taken[0].id)


def test_the_job_is_a_function_that_there_is_and_json(queue: WebhookQueue) -> None:
    queue.enqueue(["job-1:1:succeeded"])
    found = job(queue, "job-1:1:succeeded")
    assert found is not None
    assert (found.func_name, found.args) == (JOB_FUNCTION, ["job-1:1:succeeded"])
    assert import_attribute(JOB_FUNCTION) is delivery.deliver
    assert found.data.startswith(b"[")
    assert (found.result_ttl, found.timeout, found.description) == (0, 60, "job-1:1:succeeded")


def test_an_event_is_enqueued_once_however_often_it_is_asked_for(queue: WebhookQueue) -> None:
    queue.enqueue(["a:1:succeeded", "b:1:failed", "a:1:succeeded"])
    queue.enqueue(["b:1:failed"])
    assert queue.rq.job_ids == [queue.job_id("a:1:succeeded"), queue.job_id("b:1:failed")]


def test_an_event_whose_process_died_is_put_back_though_rq_keeps_the_name_of_its_execution(
    queue: WebhookQueue,
) -> None:
    """Guards `except ValueError` in WebhookQueue._delete: for a minute RQ cannot delete such a job."""
    queue.enqueue(["a:1:succeeded"])
    dead = job(queue, "a:1:succeeded")
    assert dead is not None
    in_a_minute = datetime.now(UTC) + timedelta(minutes=1)
    queue.rq.connection.zadd(dead.execution_registry.key, {"expired": in_a_minute.timestamp()})
    fail_in_rq(queue, "a:1:succeeded")
    queue.put_back("a:1:succeeded", datetime.now(UTC))
    assert status_in_rq(queue, "a:1:succeeded") == JobStatus.QUEUED
    assert queue.failed_ids() == set()
    assert queue.rq.job_ids == [queue.job_id("a:1:succeeded")]


def test_a_job_that_is_scheduled_or_failed_is_not_enqueued_beside_that(queue: WebhookQueue) -> None:
    queue.put_back("a:1:succeeded", datetime.now(UTC) + timedelta(hours=1))
    queue.enqueue(["b:1:failed"])
    fail_in_rq(queue, "b:1:failed")
    queue.enqueue(["a:1:succeeded", "b:1:failed"])
    assert queue.rq.job_ids == []


def test_two_prefixes_on_one_redis_have_nothing_in_common(redis_at: RedisServer, queue: WebhookQueue) -> None:
    other = WebhookQueue(redis_at.url, f"{queue.rq.name}-other")
    queue.enqueue(["a:1:succeeded"])
    other.enqueue(["a:1:succeeded"])
    assert queue.rq.count == other.rq.count == 1
    other.discard("a:1:succeeded")
    assert (queue.rq.count, other.rq.count) == (1, 0)
    other.close()


@pytest.mark.parametrize("event_id", ["ü \U0001f58c", "a.b:c/d e\n", "x" * 200, ""])
def test_every_event_id_has_an_id_that_rq_takes(queue: WebhookQueue, event_id: str) -> None:
    queue.enqueue([event_id])
    assert status_in_rq(queue, event_id) is JobStatus.QUEUED


def test_what_is_put_back_is_out_of_every_registry_and_due_when_it_should_be(queue: WebhookQueue) -> None:
    queue.enqueue(["a:1:succeeded"])
    fail_in_rq(queue, "a:1:succeeded")
    due_at = (datetime.now(UTC) + timedelta(hours=1)).replace(microsecond=0)
    queue.put_back("a:1:succeeded", due_at)
    assert queue.failed_ids() == set()
    assert queue.rq.scheduled_job_registry.get_scheduled_time(queue.job_id("a:1:succeeded")) == due_at
    queue.put_back("a:1:succeeded", datetime.now(UTC))
    assert queue.rq.scheduled_job_registry.get_job_ids() == []
    assert queue.rq.job_ids == [queue.job_id("a:1:succeeded")]


def test_a_remnant_of_a_job_is_no_obstacle(queue: WebhookQueue) -> None:
    queue.rq.connection.hset(Job.key_for(queue.job_id("a:1:succeeded")), "last_heartbeat", "x")
    queue.put_back("a:1:succeeded", datetime.now(UTC))
    assert status_in_rq(queue, "a:1:succeeded") is JobStatus.QUEUED


@pytest.mark.parametrize("url", ["http://:s3cr3t@nowhere", "redis://:s3cr3t@nowhere?unknown=1"])
def test_what_is_no_url_of_a_redis_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ValueError, match="not the URL of a Redis") as caught:
        WebhookQueue(url, "sdxl")
    assert "s3cr3t" not in str(caught.value)


def test_a_delivery_that_was_never_enqueued_is_found_after_its_grace(
    bench: Bench, queue: WebhookQueue, sweeper: Sweeper
) -> None:
    event_id = bench.add(url=URL)
    assert sweeper.sweep() == 0
    bench.later(GRACE_S + 1)
    assert sweeper.sweep() == 1
    assert status_in_rq(queue, event_id) is JobStatus.QUEUED
    assert sweeper.sweep() == 0
    assert queue.rq.count == 1


def test_a_delivery_that_rq_holds_is_left_alone_however_late_it_is(
    bench: Bench, queue: WebhookQueue, sweeper: Sweeper
) -> None:
    ids = [bench.add(event_kit.failed(f"job-{number}"), URL) for number in range(3)]
    queue.put_back(ids[0], datetime.now(UTC) + timedelta(hours=1))
    queue.enqueue(ids[1:])
    taken = queue.rq.dequeue_any([queue.rq], None, connection=queue.rq.connection, serializer=JSONSerializer)
    assert taken is not None  # and so it is in RQ's intermediate queue
    bench.later(86_400)
    assert sweeper.sweep() == 0
    queue.rq.connection.delete(queue.rq.intermediate_queue_key)
    assert sweeper.sweep() == 1
    assert status_in_rq(queue, ids[1]) is JobStatus.QUEUED


def test_a_job_that_says_scheduled_and_is_nowhere_comes_back(
    bench: Bench, queue: WebhookQueue, sweeper: Sweeper
) -> None:
    event_id = bench.add(url=URL)
    queue.put_back(event_id, datetime.now(UTC) + timedelta(hours=1))
    queue.rq.scheduled_job_registry.remove(queue.job_id(event_id))
    bench.later(GRACE_S + 1)
    assert sweeper.sweep() == 1
    assert queue.rq.job_ids == [queue.job_id(event_id)]


def test_a_redis_that_has_forgotten_everything_is_filled_again(
    bench: Bench, queue: WebhookQueue, sweeper: Sweeper, redis_at: RedisServer
) -> None:
    ids = [bench.add(event_kit.failed(f"job-{number}"), URL) for number in range(5)]
    queue.enqueue(ids)
    for event_id in ids:
        queue.discard(event_id)
    bench.later(GRACE_S + 1)
    assert sweeper.sweep() == 5
    assert set(queue.rq.job_ids) == {queue.job_id(event_id) for event_id in ids}


def test_a_job_whose_process_died_goes_on_when_its_row_says(
    bench: Bench, queue: WebhookQueue, sweeper: Sweeper
) -> None:
    event_id = bench.add(url=URL)
    queue.enqueue([event_id])
    assert bench.rows.begin(bench.row(event_id), 300)
    fail_in_rq(queue, event_id)
    assert sweeper.sweep() == 1
    assert queue.failed_ids() == set()
    due_at = queue.rq.scheduled_job_registry.get_scheduled_time(queue.job_id(event_id))
    assert due_at == bench.row(event_id).due_at.replace(microsecond=0)
    assert (bench.row(event_id).state, bench.row(event_id).attempts) == (PENDING, 1)


@pytest.mark.parametrize(("state", "stays"), [(GAVE_UP, True), (DELIVERED, False)])
def test_rqs_failed_registry_holds_what_the_rows_say_has_failed_and_nothing_else(
    bench: Bench, queue: WebhookQueue, sweeper: Sweeper, state: str, stays: bool
) -> None:
    event_id = bench.add(url=URL)
    queue.enqueue([event_id])
    fail_in_rq(queue, event_id)
    bench.rows.end(event_id, state, 200, None)
    for _ in range(2):
        assert sweeper.sweep() == 0
        assert queue.failed_ids() == ({queue.job_id(event_id)} if stays else set())
    assert queue.rq.count == 0


def test_what_failed_once_and_again_after_a_retry_is_looked_at_again(
    bench: Bench, queue: WebhookQueue, sweeper: Sweeper
) -> None:
    event_id = bench.add(url=URL)
    queue.enqueue([event_id])
    fail_in_rq(queue, event_id)
    bench.rows.end(event_id, GAVE_UP, 500, "no")
    sweeper.sweep()
    bench.rows.revive([event_id])
    queue.put_back(event_id, bench.now)
    sweeper.sweep()
    fail_in_rq(queue, event_id)
    assert sweeper.sweep() == 1
    assert queue.failed_ids() == set()


def test_a_failed_job_without_a_row_is_forgotten(queue: WebhookQueue, sweeper: Sweeper, redis_at: RedisServer) -> None:
    queue.enqueue(["nobody:1:failed"])
    fail_in_rq(queue, "nobody:1:failed")
    assert sweeper.sweep() == 0
    assert status_in_rq(queue, "nobody:1:failed") is None
    with Redis.from_url(redis_at.url) as redis:
        assert not redis.exists(Job.key_for(queue.job_id("nobody:1:failed")))
