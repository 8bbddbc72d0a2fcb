"""Faults 19 to 25: what befalls a consumer, short of its sudden death (test_consumer_kills.py)."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.kills_kit import events_of, has_started, is_frozen, job, survivor, thaw_and_measure
from tests.chaos.world import BUCKET, World

SLOWLY: dict[str, Any] = {"CHAOS_STEP_S": "0.2", "SDXL_DRAIN_SECONDS": "30"}  # four seconds

shut_down = pytest.mark.fault(19, "SIGTERM drain, twice")
frozen = pytest.mark.fault(21, "SIGSTOP beyond the lease, then SIGCONT")
out_of_memory = pytest.mark.fault(22, "CUDA OOM")
black = pytest.mark.fault(23, "black or NaN image")


@shut_down
def test_a_consumer_told_to_stop_ends_its_job_and_hands_back_the_rest_uncounted(world: World) -> None:
    """Guards the wait for `tasks` in `Worker._drain`, and the uncounting in RELEASE."""
    other = survivor(world)
    stopped = world.consumer(**SLOWLY)
    world.publish("a")
    world.until(lambda: has_started(world, "a"))
    world.publish("b", "c")
    world.until(lambda: job(world, "b").get("attempt") == "1")
    stopped.signal(signal.SIGTERM)
    assert stopped.wait() == 0
    ended = thaw_and_measure(world, other)
    assert world.executions() == {"a": 1, "b": 1, "c": 1}
    assert [ended[name]["data"]["attempt"] for name in "abc"] == [1, 1, 1]
    assert job(world, "b")["handbacks"] == "1"


@shut_down
def test_a_consumer_told_to_stop_twice_hands_back_its_running_job_uncounted(world: World) -> None:
    """Guards `urgent` in `Worker._drain`: the drawing would go on for half a minute."""
    other = survivor(world)
    stopped = world.consumer(CHAOS_STEP_S="1.5", SDXL_DRAIN_SECONDS="60")
    world.publish("a")
    world.until(lambda: has_started(world, "a"))
    stopped.signal(signal.SIGTERM)
    world.until(lambda: stopped.said("consumer.draining"))
    stopped.signal(signal.SIGTERM)
    assert stopped.wait(20) == 0
    assert thaw_and_measure(world, other)["a"]["data"]["attempt"] == 1


@pytest.mark.fault(20, "the platform's time limit")
def test_a_consumer_that_is_killed_before_it_has_drained_costs_its_job_one_attempt(world: World) -> None:
    """Guards that what has not begun is handed back first in `Worker._drain`, and the reclaim of the rest."""
    other = survivor(world)
    limited = world.consumer(**SLOWLY)
    world.publish("a")
    world.until(lambda: has_started(world, "a"))
    world.publish("b")
    world.until(lambda: job(world, "b").get("attempt") == "1")
    limited.signal(signal.SIGTERM)
    world.until(lambda: job(world, "b").get("handbacks") == "1")
    limited.kill()
    ended = thaw_and_measure(world, other)
    assert [ended[name]["data"]["attempt"] for name in "ab"] == [2, 1]


@frozen
@pytest.mark.parametrize("place", ["progress.after", "upload.before", "upload.after", "finish.before"])
def test_a_consumer_that_wakes_after_its_lease_publishes_nothing(world: World, place: str) -> None:
    """Guards the two fences of FINISH, `held[1] ~= lease` and `is_owner`: the job is another's, and still being drawn.

    At `progress.after` they are never reached, since the renewal or the next step tells it first (`heed`); without
    that the fences would, so that this case shows only that one of the two holds.
    """
    other = survivor(world, **SLOWLY)
    sleeper = world.consumer(failpoints=f"{place}=stop")
    world.publish("a")
    world.until(lambda: is_frozen(sleeper))
    world.injected()
    other.signal(signal.SIGCONT)
    world.until(lambda: other.said("job.begun"))
    sleeper.signal(signal.SIGCONT)
    world.until(lambda: sleeper.said("lease.lost"))
    assert not world.ended()
    ended = world.until_ended()
    world.recovered()
    assert ended["a"]["data"]["attempt"] == 2
    assert str(other.process.pid) in ended["a"]["data"]["consumer"].split("-")


@frozen
def test_a_consumer_that_wakes_after_the_end_replaces_no_picture(world: World) -> None:
    """Guards the condition of the PUT in `UploadUrls.put`: the URL is good, and another's picture is there."""
    path = f"/{BUCKET}/images/a.png"
    other = survivor(world)
    sleeper = world.consumer(failpoints="note_upload.after=stop")
    world.publish("a", upload_url=world.store.presign("PUT", path))
    world.until(lambda: is_frozen(sleeper))
    thaw_and_measure(world, other)
    stored = world.store.objects[path]
    world.store.put(path, b"as another GPU would round it")
    sleeper.signal(signal.SIGCONT)
    world.until(lambda: sleeper.said("lease.lost"))
    assert world.store.objects[path].body == b"as another GPU would round it"
    world.store.objects[path] = stored


@out_of_memory
def test_a_job_that_meets_a_full_gpu_is_drawn_again(world: World) -> None:
    """Guards the retry of a RetryableError in `Outcomes.end`."""
    world.consumer()
    world.publish("a", prompt="out of memory")
    world.injected()
    ended = world.until_ended()
    world.recovered()
    assert ended["a"]["type"] == "generation.succeeded"
    assert events_of(world, "a") == ["started:1", "retrying:1", "started:2", "succeeded"]


@out_of_memory
def test_a_job_that_no_gpu_can_hold_is_tried_again_twice_at_most(world: World) -> None:
    """Guards `max_attempts=3` of CUDA_OOM in ERROR_TABLE, and that it keeps no other job from the GPU."""
    world.consumer(SDXL_MAX_ATTEMPTS="9")
    world.publish("a", prompt="always out of memory")
    world.publish("b")
    world.injected()
    ended = world.until_ended()
    world.recovered()
    data = ended["a"]["data"]
    assert (data["error_code"], data["attempt"], data["retry_after"]) == ("CUDA_OOM", 3, 30)
    assert data["dead_lettered"]
    assert ended["b"]["type"] == "generation.succeeded"


@out_of_memory
def test_a_consumer_whose_gpu_is_lost_leaves_and_costs_nobody_else_an_attempt(world: World) -> None:
    """Guards `self.broken = error` in `Health._note`, and what `Worker._attempt` and `_holding_gpu` make of it."""
    other = survivor(world)
    broken = world.consumer()
    world.publish("a", prompt="device lost")
    world.publish("b", "c")
    assert broken.wait() == 1
    ended = thaw_and_measure(world, other)
    assert [ended[name]["data"]["attempt"] for name in "abc"] == [2, 1, 1]
    assert world.executions() == {"a": 2, "b": 1, "c": 1}
    ledger = [line.split() for line in (world.folder / "ledger").read_text().splitlines()]
    assert [job_id for job_id, pid in ledger if int(pid) == broken.process.pid][-1] == "a"


@black
def test_a_black_picture_is_drawn_again_and_never_published(world: World) -> None:
    """Guards that GenerationFailed is retried, 30 s in its rule, and that nothing is stored before it.

    What is black, and what is NaN, `consumer.pipeline.decode` says: tests/unit/test_engine_errors.py,
    `test_a_nan_or_black_image_is_a_failed_generation`.
    """
    world.consumer()
    world.publish("once", prompt="black")
    world.publish("ever", prompt="always black")
    world.injected()
    ended = world.until_ended()
    world.recovered()
    assert ended["once"]["data"]["attempt"] == 2
    data = ended["ever"]["data"]
    assert (data["error_code"], data["attempt"], data["retry_after"]) == ("GENERATION_FAILED", 3, 30)
    assert f"/{BUCKET}/images/ever.png" not in world.store.objects


@pytest.mark.fault(24, "host out of memory")
@pytest.mark.parametrize("step", ["prepare", "generate", "encode"])
def test_a_job_that_finds_no_memory_is_tried_again_and_the_consumer_goes_on(world: World, step: str) -> None:
    """Guards the last case of `Outcomes.end`. Where the kernel kills, it is a SIGKILL: test_consumer_kills.py."""
    consumer = world.consumer(failpoints=f"{step}.before=memory")
    world.publish("a", "b")
    world.injected()
    ended = world.until_ended()
    world.recovered()
    assert sorted(ended[name]["data"]["attempt"] for name in "ab") == [1, 2]
    assert "retrying:1" in [*events_of(world, "a"), *events_of(world, "b")]
    assert consumer.process.poll() is None


@pytest.mark.fault(25, "disk full")
def test_a_full_disk_loses_its_cache_and_the_jobs_go_on(world: World, tmp_path: Path) -> None:
    """Guards `LoraFetcher._with_room`, and its `no space left` where even an empty disk is too small."""
    with a_small_disk(tmp_path / "disk", bytes_=131_072):  # two files of the three
        world.consumer(LORA_CACHE_DIR=str(tmp_path / "disk"))
        for name in "abc":
            world.store.put(f"/{BUCKET}/loras/{name}", b"lora" + bytes(50_000))
            world.publish(name, lora_url=None, lora_key=f"loras/{name}")
        world.store.put(f"/{BUCKET}/loras/huge", b"lora" + bytes(200_000))
        world.publish("huge", lora_url=None, lora_key="loras/huge")
        world.injected()
        ended = world.until_ended()
        world.recovered()
        world.stop_consumers()
    assert {ended[name]["type"] for name in "abc"} == {"generation.succeeded"}
    assert world.consumers[0].said("lora_cache_out_of_space")
    data = ended["huge"]["data"]
    assert (data["error_code"], data["attempt"], data["retry_after"]) == ("LORA_DOWNLOAD_FAILED", 3, 60)
    assert "no space left" in data["error"]


@contextmanager
def a_small_disk(folder: Path, *, bytes_: int) -> Iterator[None]:
    folder.mkdir()
    mount, umount = shutil.which("mount"), shutil.which("umount")
    command = [str(mount), "-t", "tmpfs", "-o", f"size={bytes_}", "tmpfs", str(folder)]
    if not (mount and umount) or os.geteuid() != 0 or subprocess.run(command, check=False).returncode != 0:
        pytest.skip("needs the right to mount; the same without a disk: tests/integration/test_fetch.py")
    try:
        yield
    finally:
        subprocess.run([umount, "--lazy", str(folder)], check=True)
