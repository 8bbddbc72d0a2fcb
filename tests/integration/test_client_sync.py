"""The client for code without an event loop, on a real Redis."""

import inspect
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any

import pytest

from demo.servers import RedisServer
from producer.client import AsyncGenerationClient, GenerationClient
from producer.errors import JobConflict, JobFailed, JobUnknown, RequestRefused, WaitTimeout
from producer.jobs import CancelVerdict, Job, Progress
from producer.settings import ProducerSettings
from producer.storage import PresignedUrls
from schemas.keys import JobState, Keys
from tests import event_kit
from tests.integration import client_kit
from tests.integration.client_kit import STORAGE, Ender, a_client

Consume = Callable[[Callable[[Ender], Coroutine[Any, Any, Any]]], Any]


@pytest.fixture
def client(redis_at: RedisServer, keys: Keys) -> Iterator[GenerationClient]:
    with GenerationClient(a_client(redis_at.url, keys)) as client:
        yield client


@pytest.fixture
def consume(redis_at: RedisServer, keys: Keys) -> Consume:
    return partial(client_kit.consume, redis_at.url, keys)


def test_a_job_is_submitted_looked_at_and_waited_for(client: GenerationClient, consume: Consume) -> None:
    job = client.submit(prompt="a fox")
    assert client.submit(prompt="a fox", job_id=job.job_id).duplicate
    assert client.status(job.job_id).state == JobState.QUEUED
    event = consume(lambda ann: ann.succeed_next())
    assert client.result(job.job_id, timeout_s=10) == event


def test_errors_are_those_of_the_async_client(client: GenerationClient, consume: Consume) -> None:
    client.submit(prompt="a fox", job_id="job-1")
    with pytest.raises(JobConflict):
        client.submit(prompt="a cat", job_id="job-1")
    with pytest.raises(RequestRefused):
        client.submit(prompt="")
    with pytest.raises(JobUnknown):
        client.status("nobody")
    with pytest.raises(WaitTimeout):
        client.result("job-1", timeout_s=0.05)
    consume(lambda ann: ann.fail_next())
    with pytest.raises(JobFailed):
        client.result("job-1")


def test_many_are_submitted_cancelled_and_submitted_again(client: GenerationClient) -> None:
    [job, refused] = client.submit_many([{"prompt": "a fox"}, {"prompt": ""}])
    assert isinstance(job, Job)
    assert isinstance(refused, RequestRefused)
    assert client.cancel(job.job_id).verdict == CancelVerdict.CANCELLED
    assert client.resubmit(job.job_id, steps=30) == Job(job.job_id, 2, JobState.QUEUED, duplicate=False)


@pytest.mark.parametrize("name", ["submit", "submit_many", "resubmit", "status", "events", "result", "cancel"])
def test_a_method_takes_what_the_async_one_takes_and_sends_to_its_docs(name: str) -> None:
    ours, theirs = getattr(GenerationClient, name), getattr(AsyncGenerationClient, name)
    assert inspect.signature(ours).parameters == inspect.signature(theirs).parameters
    assert ours.__doc__ == f"See `AsyncGenerationClient.{name}`."
    assert inspect.getdoc(theirs)


def test_limits_signing_and_traces_reach_the_async_client(
    redis_at: RedisServer, keys: Keys, client: GenerationClient, consume: Consume
) -> None:
    for option, limit in (("queue_timeout_s", "queue"), ("timeout_s", "total")):
        job = client.submit(prompt="a fox")
        options: Any = {option: 0.05, "cancel_on_timeout": True}
        with pytest.raises(WaitTimeout) as caught:
            client.result(job.job_id, **options)
        assert caught.value.details == {"limit": limit}
        assert client.status(job.job_id).state == JobState.CANCELLED
    job = client.submit(prompt="a fox")
    consume(lambda ann: ann.run_next())
    with pytest.raises(WaitTimeout) as caught:
        client.result(job.job_id, run_timeout_s=0.05)
    assert caught.value.details == {"limit": "run"}
    with pytest.raises(RequestRefused, match="presigned"):
        client.submit(prompt="a fox", lora_key="a", presign=True)
    [refused] = client.submit_many([{"prompt": "a fox", "lora_key": "a"}], presign=True)
    assert isinstance(refused, RequestRefused)
    for submit in (client.submit_many, lambda fields, **options: client.submit(**fields[0], **options)):
        with pytest.raises(RequestRefused, match="traceparent"):
            submit([{"prompt": "a fox"}], traceparent="x")


def test_a_run_whose_url_had_expired_is_signed_again(redis_at: RedisServer, keys: Keys, consume: Consume) -> None:
    with GenerationClient(a_client(redis_at.url, keys, storage=STORAGE)) as client:
        client.submit(prompt="a fox", job_id="job-1", lora_key="a", presign=True)
        consume(lambda ann: ann.expire_next())
        with pytest.raises(WaitTimeout):
            client.result("job-1", resign=True, timeout_s=0.2)
        assert client.status("job-1").run == 2


def test_events_are_iterated_up_to_the_end(client: GenerationClient, consume: Consume) -> None:
    client.submit(prompt="a fox", job_id="job-1")

    async def draw(ann: Ender) -> None:
        lease, delivery = await ann.run_next()
        await ann.leases.progress(lease, 1, 28, 13.5)
        await ann.end(lease, delivery, event_kit.succeeded("job-1"))

    consume(draw)
    # the hash has the end already, so no step is shown
    assert list(client.events("job-1")) == [event_kit.succeeded("job-1")]


def test_an_iteration_that_is_left_early_holds_nothing(client: GenerationClient, consume: Consume) -> None:
    client.submit(prompt="a fox", job_id="job-1")

    async def one_step(ann: Ender) -> None:
        lease, _ = await ann.run_next()
        await ann.leases.progress(lease, 1, 28, 13.5)

    consume(one_step)
    for item in client.events("job-1"):
        assert item == Progress(1, 28, 13.5)
        break
    assert client.status("job-1").state == JobState.RUNNING


def test_threads_share_a_client(client: GenerationClient) -> None:
    jobs: list[Job] = []
    threads = [threading.Thread(target=lambda: jobs.append(client.submit(prompt="a fox"))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({job.job_id for job in jobs}) == 16


def test_closing_ends_what_another_thread_waits_for(redis_at: RedisServer, keys: Keys) -> None:
    client = GenerationClient(a_client(redis_at.url, keys))
    client.submit(prompt="a fox", job_id="job-1")
    ended: list[type[BaseException]] = []

    def wait() -> None:
        try:
            client.result("job-1")
        except BaseException as error:
            ended.append(type(error))

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    time.sleep(0.2)  # whether it waits yet or not, it must end
    closing = threading.Thread(target=client.close, daemon=True)
    closing.start()
    for thread in (closing, waiting):
        thread.join(10)
        assert not thread.is_alive()
    assert len(ended) == 1


@pytest.mark.parametrize("make", [AsyncGenerationClient.from_settings, GenerationClient.from_settings])
def test_a_client_is_made_of_settings_and_connects_to_nothing(make: Callable[..., Any]) -> None:
    settings = ProducerSettings(redis_url="redis://nowhere.invalid:1/0", r2_bucket=None)
    client = make(settings)
    assert client.storage is None
    if isinstance(client, GenerationClient):
        client.close()


def test_the_storage_of_the_settings_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "R2_ACCESS_KEY_ID": "id",
        "R2_SECRET_ACCESS_KEY": "secret",
        "R2_BUCKET_NAME": "pictures",
        "R2_ENDPOINT_URL": "https://account.r2.example/",
    }.items():
        monkeypatch.setenv(name, value)
    with GenerationClient.from_settings(ProducerSettings()) as client:
        assert isinstance(client.storage, PresignedUrls)
        assert client.storage.owns(client.storage.lora_url("a.safetensors")) == "a.safetensors"
