"""The worker's loop on a real Redis, with a fake GPU: overlap, retries, fencing, outages, draining."""

import asyncio
import signal
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from redis import exceptions
from redis.asyncio import Redis
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from consumer.engine import LoraFile, PreparedLoras
from consumer.errors import (
    GenerationFailed,
    GpuOutOfMemory,
    LoraFetchInterrupted,
    LoraUrlExpired,
    ModelBroken,
    UploadInterrupted,
)
from consumer.outcomes import Outcomes
from consumer.queue import Delivery, connect
from demo.servers import RedisServer, redis_server
from schemas.keys import CONSUMER_GROUP, Keys, Priority
from tests.fakes import FakeEngine
from tests.integration.queue_kit import a_request, add, completions, entries, job, let_lease_run_out, publish, where_is
from tests.integration.worker_kit import Bench, of_job

pytestmark = pytest.mark.usefixtures("short_reads")


@pytest.fixture
def bench(redis: Redis, keys: Keys, redis_at: RedisServer) -> Bench:
    return Bench(redis, keys, redis_at.url)


async def test_a_job_goes_all_the_way(bench: Bench) -> None:
    async with bench.working():
        await publish(bench.redis, bench.keys, a_request(metadata={"avatar": 7}))
        events = await bench.ended("job-1")
    assert of_job(events, "job-1") == ["started", "succeeded"]
    data = events[-1]["data"]
    assert data["request_metadata"] == {"avatar": 7}
    assert data["image_key"] == "images/job-1.png"
    assert data["consumer"] == "ann"
    assert data["metadata"] == {"seed_used": a_request().effective_seed, "actual_steps": 28, "actual_cfg": 5.5}
    assert set(data["timings"]) == {"queued", "prepare", "generate", "encode", "upload", "total"}
    assert events[-1]["id"] == "job-1:1:succeeded"
    assert await where_is(bench.redis, bench.keys) == ["done"]


async def test_the_next_lora_is_fetched_and_the_last_picture_stored_while_the_gpu_draws(bench: Bench) -> None:
    bench.engine.step_s = 0.01
    bench.artifacts.store_s = 0.15
    order: list[str] = []
    bench.engine.log = bench.fetcher.log = bench.artifacts.log = order
    for name in "abc":
        await publish(bench.redis, bench.keys, a_request(name, lora_key=f"{name}.safetensors", steps=30))
    async with bench.working():
        await bench.ended("a", "b", "c")
    assert order.index("fetch b.safetensors") < order.index("drawn a")
    assert order.index("draw b") < order.index("stored a") < order.index("drawn b")
    assert [line for line in order if line.startswith("draw ")] == ["draw a", "draw b", "draw c"]


async def test_a_picture_that_is_being_stored_keeps_no_other_job_from_the_gpu(bench: Bench) -> None:
    bench.artifacts.store_s = 0.3
    order: list[str] = []
    bench.engine.log = bench.artifacts.log = order
    for name in "ab":
        await publish(bench.redis, bench.keys, a_request(name))
    async with bench.working(prefetch=0):
        await bench.ended("a", "b")
    assert order.index("draw b") < order.index("stored a")


async def test_two_loras_are_fetched_side_by_side_while_the_gpu_draws(bench: Bench) -> None:
    """Guards the count of slots in `Worker`: one that takes longer to fetch than a picture to draw must not cost more.

    What is fetched ends only when both are under way.
    """
    order: list[str] = []
    bench.engine.log = bench.fetcher.log = order
    bench.engine.step_s = 0.01
    bench.fetcher.until = lambda: order.count("fetch b.safetensors") + order.count("fetch c.safetensors") == 2
    await publish(bench.redis, bench.keys, a_request("a", steps=50))
    for name in "bc":
        await publish(bench.redis, bench.keys, a_request(name, lora_key=f"{name}.safetensors", steps=20))
    async with bench.working():
        await bench.ended("a", "b", "c")
    assert order.index("fetch c.safetensors") < order.index("drawn a")


async def test_a_prefetch_of_zero_takes_nothing_while_the_gpu_draws(bench: Bench) -> None:
    bench.engine.step_s = 0.02
    for name in "ab":
        await publish(bench.redis, bench.keys, a_request(name))
    async with bench.working(prefetch=0):
        await bench.until(bench.engine.drawing.is_set)
        await asyncio.sleep(0.1)
        pending = await bench.redis.xpending(bench.keys.requests(Priority.NORMAL), CONSUMER_GROUP)
        assert pending["pending"] == 1


async def test_a_prepared_job_gets_the_gpu_though_redis_answers_nothing(tmp_path: Path, keys: Keys) -> None:
    """Guards `behind` in `Stages.generate`: no round trip to Redis lies between two pictures."""
    with redis_server(tmp_path) as server:
        redis = connect(server.url)
        bench = Bench(redis, keys, server.url, FakeEngine(step_s=0.02))
        for name in "ab":
            await publish(redis, keys, a_request(name, steps=30))
        async with bench.working(lease_s=30):
            await bench.until(lambda: bench.engine.log.count("prepare") == 2 and bench.engine.drawing.is_set())
            server.process.send_signal(signal.SIGSTOP)
            try:
                await bench.until(lambda: "draw b" in bench.engine.log, within_s=3)
            finally:
                server.process.send_signal(signal.SIGCONT)
            await bench.ended("a", "b")
        await redis.aclose()


async def test_the_log_says_how_long_the_gpu_waited_for_each_picture_but_the_first(bench: Bench) -> None:
    """Guards what `Stages.generate` logs."""
    bench.engine.step_s = 0.002
    for name in "abc":
        await publish(bench.redis, bench.keys, a_request(name))
    with capture_logs(processors=[merge_contextvars]) as logs:
        async with bench.working():
            await bench.ended("a", "b", "c")
    waited = [line for line in logs if line["event"] == "gpu.waited"]
    assert [line["job_id"] for line in waited] == ["b", "c"]
    assert all(0 <= line["handover_ms"] <= line["ms"] for line in waited)


async def test_uploads_that_hang_keep_nobody_from_the_gpu_until_four_of_them_do(bench: Bench) -> None:
    """Guards `_deliveries` in `Worker._work`: pictures that nothing can be done with do not pile up without end."""
    bench.artifacts.store_s = 30
    for number in range(10):
        await publish(bench.redis, bench.keys, a_request(f"job-{number}", steps=20))
    async with bench.working(drain_s=0):
        await bench.until(lambda: sum(line.startswith("drawn") for line in bench.engine.log) == 7)
        await asyncio.sleep(0.2)
        assert sum(line.startswith("store ") for line in bench.artifacts.log) == 4
        assert sum(line.startswith("draw ") for line in bench.engine.log) == 7  # three more keep their slots


async def test_an_entry_whose_delivery_got_lost_is_found_among_our_own(bench: Bench) -> None:
    """The server has given it to us, and the connection broke before the reply came."""

    lost: list[Any] = []

    class LosingReader:
        def __init__(self, reader: Redis) -> None:
            self._reader = reader

        async def xreadgroup(self, *arguments: Any, **options: Any) -> Any:
            reply = await self._reader.xreadgroup(*arguments, **options)
            if reply and not lost:
                lost.append(reply)
                raise exceptions.ConnectionError("reset")
            return reply

    bench.wrap_reader = LosingReader
    async with bench.working(lease_s=60):
        await publish(bench.redis, bench.keys, a_request())
        events = await bench.ended("job-1")
    assert len(lost) == 1
    assert of_job(events, "job-1") == ["started", "succeeded"]


async def test_no_more_is_taken_than_one_running_one_prepared_and_one_on_its_way(bench: Bench) -> None:
    bench.engine.step_s = 0.02
    for number in range(5):
        await publish(bench.redis, bench.keys, a_request(f"job-{number}"))
    async with bench.working():
        await bench.until(bench.engine.drawing.is_set)
        await asyncio.sleep(0.1)
        pending = await bench.redis.xpending(bench.keys.requests(Priority.NORMAL), CONSUMER_GROUP)
        assert pending["pending"] == 3


async def test_a_passing_failure_is_retried_and_counted(bench: Bench) -> None:
    bench.fetcher.fail_with = [LoraFetchInterrupted("the LoRA's host answered 503", details={"status": 503})]
    async with bench.working():
        await publish(bench.redis, bench.keys, a_request(lora_key="x"))
        events = await bench.ended("job-1")
    assert of_job(events, "job-1") == ["retrying", "started", "succeeded"]
    retrying = events[0]
    assert retrying["id"] == "job-1:1:retrying:1"
    assert retrying["data"]["error_code"] == "LORA_DOWNLOAD_FAILED"
    assert 0 <= retrying["data"]["retry_after"] <= 0.01
    assert events[-1]["data"]["attempt"] == 2


async def test_a_failure_that_never_passes_ends_the_run_after_its_last_attempt(bench: Bench) -> None:
    bench.artifacts.fail_with = [UploadInterrupted("the storage answered 500")] * 5
    async with bench.working(max_attempts=2):
        await publish(bench.redis, bench.keys, a_request())
        events = await bench.ended("job-1")
    assert of_job(events, "job-1") == ["started", "retrying", "started", "failed"]
    data = events[-1]["data"]
    assert (data["error_code"], data["retry_after"], data["dead_lettered"], data["attempt"]) == (
        "UPLOAD_FAILED",
        60,
        True,
        2,
    )
    assert await bench.redis.xlen(bench.keys.dead) == 1


async def test_an_out_of_memory_is_retried_at_most_twice(bench: Bench) -> None:
    bench.engine.fail_with = [GpuOutOfMemory("CUDA out of memory")] * 9
    async with bench.working(max_attempts=9):
        await publish(bench.redis, bench.keys, a_request())
        events = await bench.ended("job-1")
    assert of_job(events, "job-1").count("retrying") == 2
    assert events[-1]["data"]["error_code"] == "CUDA_OOM"


async def test_a_permanent_failure_ends_the_run_at_once_with_its_own_retry_after(bench: Bench) -> None:
    bench.fetcher.fail_with = [LoraUrlExpired("the LoRA's host answered 403")]
    async with bench.working():
        await publish(bench.redis, bench.keys, a_request(lora_url="https://r2.example.com/b/x?X-Amz-Signature=canary"))
        events = await bench.ended("job-1")
    assert of_job(events, "job-1") == ["failed"]
    assert events[0]["data"]["retry_after"] == 0
    [(_, letter)] = await entries(bench.redis, bench.keys.dead)
    assert b"canary" not in letter[b"payload"]
    assert b"https://r2.example.com/b/x" in letter[b"payload"]
    assert "canary" not in str(await job(bench.redis, bench.keys))


async def test_a_defect_of_ours_names_a_trace(bench: Bench) -> None:
    bench.engine.fail_with = [ZeroDivisionError("secret")] * 3
    async with bench.working(max_attempts=1):
        await publish(bench.redis, bench.keys, a_request())
        events = await bench.ended("job-1")
    data = events[-1]["data"]
    assert data["error_code"] == "INTERNAL"
    assert len(data["details"]["trace_id"]) == 32
    assert "secret" not in data["error"]


class Weights:
    """What a patch has on the GPU."""


class KeepingEngine(FakeEngine):
    """`kept`: whether what it prepared is still there. Where no picture is to fail, a LoRA does."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[weakref.ref[Weights]] = []

    def prepare(self, files: Sequence[LoraFile]) -> PreparedLoras:
        weights: Any = Weights()
        self.kept.append(weakref.ref(weights))
        if self.fail_with:
            return PreparedLoras(patch=weights)
        try:
            raise MemoryError
        except MemoryError:
            raise GpuOutOfMemory("full") from None


@pytest.mark.usefixtures("no_garbage_collection")
@pytest.mark.parametrize(
    "failures", [[GenerationFailed("black")], [ZeroDivisionError()], []], ids=["black", "defect", "no room for it"]
)
async def test_while_a_failure_is_being_written_down_nothing_of_its_loras_is_kept(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, failures: list[Exception]
) -> None:
    """Guards `_forget_frames`, without the garbage collector's help, which would come late."""
    bench.engine = engine = KeepingEngine()
    engine.fail_with = failures
    seen: list[Weights | None] = []
    fail = Outcomes._fail

    async def look_and_fail(outcomes: Outcomes, *arguments: Any) -> None:
        await asyncio.sleep(0.1)  # the GPU's thread, too, lets go
        seen.append(engine.kept[0]())
        await fail(outcomes, *arguments)

    monkeypatch.setattr(Outcomes, "_fail", look_and_fail)
    await publish(bench.redis, bench.keys, a_request(lora_key="a.safetensors"))
    async with bench.working(max_attempts=1):
        await bench.ended("job-1")
    assert seen == [None]


async def test_work_beyond_the_timeout_ends_and_waiting_for_the_gpu_does_not_count(bench: Bench) -> None:
    bench.engine.step_s = 0.06
    await publish(bench.redis, bench.keys, a_request("slow", steps=50, timeout=1))
    await publish(bench.redis, bench.keys, a_request("patient", steps=20, timeout=2))
    await publish(bench.redis, bench.keys, a_request("patient-too", steps=20, timeout=2))
    async with bench.working(prefetch=2):
        events = await bench.ended("slow", "patient", "patient-too")
    assert of_job(events, "slow") == ["started", "failed"]
    [failed] = [event["data"] for event in events if event["type"] == "generation.failed"]
    assert (failed["error_code"], failed["retry_after"]) == ("TIMEOUT", 0)
    assert of_job(events, "patient-too") == ["started", "succeeded"]


async def test_a_running_job_is_cancelled_at_its_next_step(bench: Bench) -> None:
    bench.engine.step_s = 0.05
    async with bench.working():
        await publish(bench.redis, bench.keys, a_request(steps=50))
        await bench.started()
        await bench.redis.set(bench.keys.cancel("job-1"), 1, ex=604800)
        events = await bench.ended("job-1")
    assert of_job(events, "job-1") == ["started", "cancelled"]
    assert events[-1]["data"]["stage"] == "running"
    assert "drawn job-1" not in bench.engine.log


async def test_a_job_is_cancelled_while_its_lora_is_fetched(bench: Bench) -> None:
    bench.fetcher.fetch_s = 30
    async with bench.working(lease_s=0.3):
        await publish(bench.redis, bench.keys, a_request(lora_key="x"))
        await bench.until(lambda: bench.fetcher.log)
        await bench.redis.set(bench.keys.cancel("job-1"), 1, ex=604800)
        events = await bench.ended("job-1")
    assert events[-1]["data"]["stage"] == "preparing"


async def test_a_consumer_that_lost_its_lease_stops_and_publishes_nothing(bench: Bench) -> None:
    bench.engine.step_s = 0.05
    async with bench.working():
        entry_id = await publish(bench.redis, bench.keys, a_request(steps=50))
        await bench.started()
        delivery = Delivery(bench.keys.requests(Priority.NORMAL), entry_id, {})
        await let_lease_run_out(bench.redis, bench.keys, delivery, "bob")
        await bench.redis.hset(bench.keys.job("job-1"), "lease", "bob#1")
        await bench.until(lambda: not bench.engine.drawing.is_set())
        await asyncio.sleep(0.1)
        assert "drawn job-1" not in bench.engine.log
        # nobody but bob may end it
        assert of_job(await completions(bench.redis, bench.keys), "job-1") == ["started"]
        await bench.redis.xack(delivery.stream, CONSUMER_GROUP, entry_id)
        await bench.redis.xdel(delivery.stream, entry_id)


async def test_an_entry_without_a_readable_id_is_buried_and_the_loop_goes_on(bench: Bench) -> None:
    stream = bench.keys.requests(Priority.NORMAL)
    await bench.redis.xadd(stream, {"payload": b"\xff\x00 https://h/x?X-Amz-Signature=canary"})
    await bench.redis.xadd(stream, {"nothing": "at all"})
    await bench.redis.xadd(stream, {"payload": "[]", "job_id": "named"})
    await publish(bench.redis, bench.keys, a_request())
    async with bench.working():
        events = await bench.ended("named", "job-1")
    assert of_job(events, "named") == ["failed"]
    letters = [fields for _, fields in await entries(bench.redis, bench.keys.dead)]
    assert [set(letter) for letter in letters] == [{b"raw", b"source", b"died_at"}] * 2
    assert letters[0][b"raw"] == b"\xff\x00 https://h/x"
    assert await bench.redis.xlen(stream) == 0


async def test_a_stopped_worker_ends_what_runs_and_hands_back_the_rest_uncounted(bench: Bench) -> None:
    bench.engine.step_s = 0.02
    for name in ("running", "prepared", "on-its-way", "waiting"):
        await publish(bench.redis, bench.keys, a_request(name, steps=30))
    async with bench.working() as worker:
        await bench.until(bench.engine.drawing.is_set)
        await asyncio.sleep(0.1)
        worker.request_stop()
        await asyncio.sleep(0.1)
        assert "drawn running" not in bench.engine.log  # handed back at once, not when the running job has ended
        for name in ("prepared", "on-its-way"):
            taken = await job(bench.redis, bench.keys, name)
            assert (taken["state"], taken["attempt"]) == ("queued", "0")
    assert of_job(await completions(bench.redis, bench.keys), "running") == ["started", "succeeded"]
    assert await where_is(bench.redis, bench.keys, "waiting") == ["stream"]
    bench.engine.step_s = 0
    async with bench.working("bob"):
        events = await bench.ended("prepared", "on-its-way", "waiting")
    assert [event["data"]["attempt"] for event in events] == [1] * len(events)


async def test_a_second_stop_hands_the_running_job_back_too(bench: Bench) -> None:
    bench.engine.step_s = 0.05
    await publish(bench.redis, bench.keys, a_request(steps=50))
    async with bench.working() as worker:
        await bench.started()
        worker.request_stop()
        worker.request_stop()
    assert (await job(bench.redis, bench.keys))["attempt"] == "0"
    assert of_job(await completions(bench.redis, bench.keys), "job-1") == ["started"]


async def test_an_idle_worker_leaves_by_itself(bench: Bench) -> None:
    async with bench.worker(idle_exit_s=0.2) as worker:
        await asyncio.wait_for(worker.run(), 10)
    assert await bench.redis.zcard(bench.keys.consumers) == 0


async def test_a_worker_told_to_stop_before_redis_answers_stops(tmp_path: Path, redis: Redis, keys: Keys) -> None:
    bench = Bench(redis, keys, "redis://127.0.0.1:1/0")
    async with asyncio.timeout(15), bench.working() as worker:
        await asyncio.sleep(0.1)
        worker.request_stop()


async def test_a_picture_made_while_redis_is_away_is_published_when_it_is_back(tmp_path: Path, keys: Keys) -> None:
    aof = ("--appendonly", "yes", "--appendfsync", "always")
    with redis_server(tmp_path, *aof) as server:
        port = server.port
        redis = connect(server.url)
        bench = Bench(redis, keys, server.url, FakeEngine(step_s=0.02))
        async with bench.working(lease_s=30):
            await publish(redis, keys, a_request(steps=50))
            await bench.started()
            server.process.kill()
            server.process.wait()
            await bench.until(lambda: "drawn job-1" in bench.engine.log)
            with redis_server(tmp_path, *aof, port=port):
                events = await bench.ended("job-1")
                assert of_job(events, "job-1") == ["started", "succeeded"]
                await bench.until(lambda: True)
        await redis.aclose()


async def test_two_jobs_whose_entries_share_an_id_are_both_done(bench: Bench) -> None:
    bench.engine.step_s = 0.05
    for priority, job_id in ((Priority.HIGH, "a"), (Priority.NORMAL, "b")):
        payload = a_request(job_id, steps=20).encode()
        await bench.redis.xadd(bench.keys.requests(priority), {"payload": payload}, id="1700000000000-0")
    async with bench.working(lease_s=0.6):
        events = await bench.ended("a", "b")
    assert [event["data"]["attempt"] for event in events] == [1] * 4


async def test_a_job_in_hand_is_not_begun_again_when_its_group_is_made_anew(bench: Bench) -> None:
    """Guards `not in self._keeper.leases_held` in Worker._next: the new group delivers the entry to its owner again."""
    bench.engine.step_s = 0.05
    await publish(bench.redis, bench.keys, a_request("a", steps=20))
    async with bench.working():
        await bench.started("a")
        await bench.redis.xgroup_destroy(bench.keys.requests(Priority.NORMAL), CONSUMER_GROUP)
        await publish(bench.redis, bench.keys, a_request("b", steps=20))
        await bench.ended("a", "b")
    assert [line for line in bench.engine.log if line.startswith("draw ")] == ["draw a", "draw b"]


async def test_leases_are_renewed_though_the_heartbeat_is_refused(bench: Bench) -> None:
    bench.engine.step_s = 0.05
    await bench.redis.set(bench.keys.consumers, "not a sorted set")
    await publish(bench.redis, bench.keys, a_request(steps=40))
    async with bench.working("ann", lease_s=0.6), bench.working("bob", lease_s=0.6):
        events = await bench.ended("job-1")
    assert events[-1]["data"]["attempt"] == 1
    await bench.redis.delete(bench.keys.consumers)


async def test_a_broken_model_ends_the_consumer_and_leaves_the_job_to_another(bench: Bench) -> None:
    bench.engine.fail_with = [ModelBroken("The device is lost")]
    for name in ("a", "b"):
        await publish(bench.redis, bench.keys, a_request(name))
    async with bench.worker("ann") as worker:
        await asyncio.wait_for(worker.run(), 10)
    assert isinstance(worker.broken, ModelBroken)
    assert bench.engine.log.count("prepare") <= 2  # nothing more was taken
    async with bench.working("bob"):
        events = await bench.ended("a", "b")
    assert of_job(events, "a") == ["started", "retrying", "started", "succeeded"]
    assert {event["data"]["consumer"] for event in events if event["type"] == "generation.succeeded"} == {"bob"}


async def test_a_job_whose_drawing_cannot_be_stopped_is_handed_back_uncounted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consumer.worker._ABANDON_AFTER_S", 0.1)
    bench.engine.step_s = 1.5  # longer than the worker waits
    await publish(bench.redis, bench.keys, a_request())
    async with bench.working(drain_s=0.1) as worker:
        await bench.until(bench.engine.drawing.is_set)
        await bench.until(lambda: "prepare" in bench.engine.log)
        await asyncio.sleep(0.1)
        worker.request_stop()
    held = await job(bench.redis, bench.keys)
    assert (held["state"], held["attempt"], held["handbacks"]) == ("queued", "0", "1")


async def test_a_worker_is_idle_from_its_last_jobs_end_on(bench: Bench) -> None:
    async with bench.worker(idle_exit_s=1.0) as worker:
        running = asyncio.create_task(worker.run())
        await asyncio.sleep(0.7)
        await publish(bench.redis, bench.keys, a_request())
        await bench.ended("job-1")
        ended_at = time.monotonic()
        await asyncio.wait_for(running, 10)
        assert time.monotonic() - ended_at >= 0.9


async def test_a_retried_job_keeps_its_trace(bench: Bench) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    bench.fetcher.fail_with = [LoraFetchInterrupted("503")]
    bench.engine.fail_with = [ZeroDivisionError()]
    payload, traceparent = a_request(lora_key="x").encode(), f"00-{trace}-b7ad6b7169203331-01".encode()
    await add(bench.redis, bench.keys.requests(Priority.NORMAL), {"payload": payload, "traceparent": traceparent})
    async with bench.working(max_attempts=2):
        events = await bench.ended("job-1")
    assert events[-1]["data"]["details"] == {"trace_id": trace}


async def test_an_upload_url_that_expires_behind_another_job_costs_no_gpu_time(bench: Bench) -> None:
    bench.artifacts.refuse_at_check = 2  # the first is before the preparation
    await publish(bench.redis, bench.keys, a_request())
    async with bench.working():
        events = await bench.ended("job-1")
    assert of_job(events, "job-1") == ["failed"]
    assert "draw job-1" not in bench.engine.log
