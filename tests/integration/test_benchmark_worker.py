"""The worker's benchmark, small: each of its lines is a measurement of something that happened."""

import json
from pathlib import Path

import pytest

from benchmarks import worker
from benchmarks.consumer_run import RunFailed, run_consumer
from demo.servers import RedisServer
from tests.integration.queue_kit import a_request

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ("--device", "cpu", "--dtype", "float32", "--size", "512x512", "--steps", "20", "--rank", "4")


def test_it_measures_the_consumer_and_the_usual_way_beside_it(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The consumer's GPU is simulated: what its drawing takes is not this test's matter. The usual way is real."""
    out = tmp_path / "worker.jsonl"
    sizes = ("--model", str(tiny_model), "--jobs", "6", "--serial-jobs", "1", "--simulate", "0.1", "--out", str(out))
    worker.main([*sizes, *SMALL, "--workload", "one-in-three-without"])
    assert capsys.readouterr().out == out.read_text()
    consumer, serial = map(json.loads, out.read_text().splitlines())
    assert (consumer["way"], consumer["jobs"], consumer["gpu_gap_ms"]["n"]) == ("consumer", 6, 4)
    assert consumer["images_per_s"] > 0
    assert 0 <= consumer["gpu_idle_percent"] < 100
    assert consumer["latency_s"]["generate"]["min"] >= 0.09
    assert consumer["lora_mb"]["n"] == 4
    assert (serial["way"], serial["jobs"]) == ("serial", 1)
    assert list(serial["latency_s"]) == [
        *("download", "load", "fuse", "draw", "unfuse", "unload", "encode", "upload"),
    ]
    assert all(part["min"] > 0 for part in serial["latency_s"].values())
    assert str(tiny_model) not in out.read_text()
    assert {line["environment"]["versions"]["redis"] for line in (consumer, serial)} != {None}


def test_a_consumer_that_does_not_start_is_no_measurement(redis_at: RedisServer, tmp_path: Path) -> None:
    settings = {"REDIS_URL": redis_at.url, "SDXL_PREFIX": "no-start"}
    with pytest.raises(RunFailed, match="No module named"):
        run_consumer(settings, [], tmp_path / "log", module=["benchmarks.nowhere"])


def test_a_job_that_fails_is_no_measurement(redis_at: RedisServer, tmp_path: Path) -> None:
    """Guards `_successes`: a picture that was never drawn must not count as a quick one."""
    settings = {"REDIS_URL": redis_at.url, "SDXL_PREFIX": "failing", "R2_BUCKET_NAME": "b", "SDXL_MAX_ATTEMPTS": "1"}
    with pytest.raises(RunFailed, match="job-1"):
        run_consumer(settings, [a_request()], tmp_path / "log", module=["benchmarks.simulated", "0.1"])
