"""The client's document runs as it is written, and so does its recipe for falling back on another provider."""

import asyncio
import inspect
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import pytest
from redis.asyncio import Redis

from consumer.queue import Delivery
from demo.servers import RedisServer
from producer.client import GenerationClient
from producer.errors import JobCancelled, JobFailed, JobUnknown, RequestRefused
from schemas.entries import decode_entry
from schemas.errors import ErrorCode
from schemas.keys import JobState, Keys, Priority
from tests import event_kit
from tests.docs_kit import DOCS, Block, blocks_of
from tests.integration import client_kit
from tests.integration.client_kit import PATIENCE_S, Ender, a_client, a_redis

BLOCKS = blocks_of(DOCS / "client.md")
ENVIRONMENT = {
    "R2_ACCESS_KEY_ID": "id",
    "R2_SECRET_ACCESS_KEY": "canary",
    "R2_BUCKET_NAME": "pictures",
    "R2_ENDPOINT_URL": "https://account.r2.example",
}


async def draw_everything(url: str, keys: Keys, stop: asyncio.Event) -> None:
    """A consumer that takes a job, shows two steps and succeeds, until it is stopped."""
    async with a_redis(url) as redis:
        ann = Ender(redis, keys, "ann")
        await ann.intake.ensure_groups()
        while not stop.is_set():
            for delivery in await ann.intake.read(block_ms=50):
                await draw(ann, delivery)


async def draw(ann: Ender, delivery: Delivery) -> None:
    lease, begun = await ann.begin(delivery)
    if begun.verdict != "ok":
        return
    await ann.leases.start(lease, event_kit.started(lease.job_id))
    for step in (1, 2):
        await ann.leases.progress(lease, step, 2, 2.0 - step)
    await ann.succeed(lease, delivery, run=decode_entry(delivery.fields).run)


def run(block: Block, names: dict[str, Any]) -> None:
    """Runs the block with `names` as its globals, in an event loop of its own where it awaits."""
    returned = FunctionType(block.compiled(), names)()
    if inspect.iscoroutine(returned):
        asyncio.run(asyncio.wait_for(returned, PATIENCE_S))


async def test_the_document_runs_from_its_first_example_to_its_last(
    redis_at: RedisServer, redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {**ENVIRONMENT, "REDIS_URL": redis_at.url, "SDXL_PREFIX": keys.prefix}.items():
        monkeypatch.setenv(name, value)
    stop = asyncio.Event()
    drawing = asyncio.create_task(draw_everything(redis_at.url, keys, stop))
    names: dict[str, Any] = {}
    try:
        for block in BLOCKS:
            await asyncio.wait_for(asyncio.to_thread(run, block, names), 2 * PATIENCE_S)
            assert not drawing.done(), block.line
    finally:
        stop.set()
        await drawing
        if "client" in names:
            await asyncio.to_thread(names["client"].close)
    assert (len(names["jobs"]), names["refused"]) == (6, [])
    assert names["event"].type == "generation.succeeded"
    assert len(names["pictures"]) == 2
    shown = capsys.readouterr().out
    for line in ("https://images.example/images/", "generation.succeeded", "somebody should start a consumer"):
        assert line in shown


RECIPE = next(block for block in BLOCKS if block.heading == "Falling back")
Picture = Callable[..., str]


def picture_within(queue_timeout_s: float = 20, timeout_s: float = 60) -> Picture:
    """The recipe with other limits than the document's."""
    written = "queue_timeout_s=20, timeout_s=60"
    assert written in RECIPE.text
    text = RECIPE.text.replace(written, f"queue_timeout_s={queue_timeout_s}, timeout_s={timeout_s}")
    names: dict[str, Any] = {}
    run(RECIPE._replace(text=text), names)
    found: Picture = names["picture"]
    return found


class Elsewhere:
    """Another provider: it keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def __call__(self, request: Any) -> str:
        self.asked.append(request)
        return "https://elsewhere.example/x.png"


@pytest.fixture
def elsewhere() -> Elsewhere:
    return Elsewhere()


@pytest.fixture
def client(redis_at: RedisServer, keys: Keys) -> Iterator[GenerationClient]:
    with GenerationClient(a_client(redis_at.url, keys, max_queue=1)) as client:
        yield client


def test_the_recipe_has_about_ten_lines() -> None:
    assert len(RECIPE.text.split("def picture")[1].strip().splitlines()) <= 10


async def test_what_we_draw_in_time_nobody_else_is_asked_for(
    client: GenerationClient, ann: Ender, redis: Redis, keys: Keys, elsewhere: Elsewhere
) -> None:
    drawn = asyncio.create_task(asyncio.to_thread(picture_within(), client, elsewhere, prompt="a fox"))
    await client_kit.until(lambda: waits(redis, keys))
    event = await ann.succeed_next()
    assert await drawn == event.data.image_url
    assert elsewhere.asked == []


async def waits(redis: Redis, keys: Keys) -> bool:
    return bool(await redis.xlen(keys.requests(Priority.NORMAL)))


def test_a_full_queue_sends_the_request_elsewhere_and_leaves_nothing_in_ours(
    client: GenerationClient, elsewhere: Elsewhere
) -> None:
    client.submit(prompt="somebody else's fox")
    assert (
        picture_within(queue_timeout_s=0.1)(client, elsewhere, prompt="a fox", job_id="job-1")
        == "https://elsewhere.example/x.png"
    )
    assert elsewhere.asked == [{"prompt": "a fox", "job_id": "job-1"}]
    with pytest.raises(JobUnknown):
        client.status("job-1")


def test_a_job_that_waits_too_long_is_cancelled_and_the_request_goes_elsewhere(
    client: GenerationClient, elsewhere: Elsewhere
) -> None:
    assert (
        picture_within(queue_timeout_s=0.1)(client, elsewhere, prompt="a fox", job_id="job-1")
        == "https://elsewhere.example/x.png"
    )
    assert client.status("job-1").state == JobState.CANCELLED
    assert len(elsewhere.asked) == 1


async def test_a_job_that_runs_too_long_is_asked_to_stop_and_the_request_goes_elsewhere(
    client: GenerationClient, ann: Ender, redis: Redis, keys: Keys, elsewhere: Elsewhere
) -> None:
    drawn = asyncio.create_task(
        asyncio.to_thread(picture_within(timeout_s=1), client, elsewhere, prompt="a fox", job_id="job-1")
    )
    await client_kit.until(lambda: waits(redis, keys))
    lease, _ = await ann.run_next()
    assert await drawn == "https://elsewhere.example/x.png"
    assert await ann.leases.progress(lease, 1, 28, 1.0) == "cancel"


async def test_a_run_that_its_consumer_gave_up_goes_elsewhere(
    client: GenerationClient, ann: Ender, redis: Redis, keys: Keys, elsewhere: Elsewhere
) -> None:
    drawn = asyncio.create_task(asyncio.to_thread(picture_within(), client, elsewhere, prompt="a fox"))
    await client_kit.until(lambda: waits(redis, keys))
    await ann.expire_next(code=ErrorCode.TIMEOUT)
    assert await drawn == "https://elsewhere.example/x.png"


def test_what_nobody_else_could_draw_either_stays_an_error(
    redis_at: RedisServer, keys: Keys, client: GenerationClient, elsewhere: Elsewhere
) -> None:
    with pytest.raises(RequestRefused):
        picture_within()(client, elsewhere, prompt="")
    client.submit(prompt="a fox", job_id="job-1")
    client_kit.consume(redis_at.url, keys, lambda ann: ann.fail_next())
    with pytest.raises(JobFailed):
        picture_within()(client, elsewhere, prompt="a fox", job_id="job-1")
    client.submit(prompt="a fox", job_id="job-2")
    client.cancel("job-2")
    with pytest.raises(JobCancelled):
        picture_within()(client, elsewhere, prompt="a fox", job_id="job-2")
    assert elsewhere.asked == []
