"""What the benchmarks are made of: files that are real LoRAs, a store that is no faster than it says, figures."""

import asyncio
import time
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks.consumer_run import Run, Stored
from benchmarks.environment import environment
from benchmarks.lora_files import LoraWriter, attention_layers
from benchmarks.lora_store import app
from benchmarks.spread import spread
from benchmarks.worker import parse, ranks_of
from consumer.lora.formats import parse as parse_lora
from demo import loras
from schemas.events import SucceededEvent
from tests import event_kit


def test_the_layers_are_those_of_the_model_itself(tiny_model: Path) -> None:
    expected = loras.attention_modules(loras.shapes_of(tiny_model))
    assert attention_layers(tiny_model) == {name: tuple(shape) for name, shape in expected.items()}


def test_a_folder_without_a_model_has_no_layers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no attention layers"):
        attention_layers(tmp_path)


def test_a_written_lora_changes_every_layer_and_nothing_in_it_is_skipped(tiny_model: Path, tmp_path: Path) -> None:
    layers = attention_layers(tiny_model)
    path = LoraWriter(layers).write(tmp_path / "a.safetensors", rank=8, seed=1)
    parsed = parse_lora(path, loras.shapes_of(tiny_model))
    assert {delta.module for delta in parsed.deltas} == set(layers)
    assert not parsed.skipped
    assert path.stat().st_size > sum(2 * 8 * (outputs + inputs) for outputs, inputs in layers.values())


def test_a_lora_is_about_as_strong_as_it_was_asked_to_be(tmp_path: Path) -> None:
    tensors = load_file(
        LoraWriter({"unet.a.attn1.to_q": (256, 512)}, strength=0.1).write(tmp_path / "a", rank=16, seed=1)
    )
    down, up = (tensors[f"unet.a.attn1.to_q.lora_{half}.weight"].astype(np.float32) for half in "AB")
    assert np.std(up @ down) == pytest.approx(0.1 * 512**-0.5, rel=0.2)


def test_no_two_seeds_give_the_same_file_and_one_gives_it_again(tmp_path: Path) -> None:
    writer = LoraWriter({"unet.a.attn1.to_q": (64, 64)})
    one, two, again = (
        writer.write(tmp_path / name, rank=4, seed=seed) for name, seed in (("1", 1), ("2", 2), ("3", 1))
    )
    assert one.read_bytes() == again.read_bytes()
    assert one.read_bytes() != two.read_bytes()


async def test_the_store_sends_a_file_no_faster_than_it_says_and_not_to_who_knows_it(tmp_path: Path) -> None:
    """Guards `_write` and the ETag in `lora_store`."""
    body = bytes(range(256)) * 4096
    (tmp_path / "a.safetensors").write_bytes(body)
    runner = aiohttp.web.AppRunner(app(tmp_path, mb_per_s=5.0))
    await runner.setup()
    await aiohttp.web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with aiohttp.ClientSession() as session:

        async def get(name: str, **headers: str) -> tuple[int, bytes, str]:
            async with session.get(f"{url}/{name}", headers=headers) as response:
                return response.status, await response.read(), response.headers.get("ETag", "")

        began = time.perf_counter()
        replies = await asyncio.gather(get("a.safetensors"), get("a.safetensors"))
        assert time.perf_counter() - began >= len(body) / 5e6 * 0.9
        assert [reply[:2] for reply in replies] == [(200, body)] * 2
        etag = replies[0][2]
        assert (await get("a.safetensors", **{"If-None-Match": etag}))[:2] == (304, b"")
        assert (await get("b.safetensors"))[0] == 404
    await runner.cleanup()


def test_the_spread_of_measurements() -> None:
    assert spread([]) == {"n": 0}
    assert spread([4.0, 1.0, 2.0, 3.0]) == {"n": 4, "mean": 2.5, "min": 1.0, "p50": 2.5, "p95": 4.0, "max": 4.0}
    assert spread(range(1, 101))["p95"] == 95


def test_the_figures_of_a_run_leave_out_the_first_three_jobs_and_count_what_the_gpu_waited() -> None:
    """Guards `Run.summary`: six pictures of 0.8 s behind gaps of 1.6 s in all are 25 % idle."""
    stored = []
    for number, at_s in enumerate([10.0, 20.0, 30.0, 121.0, 122.0, 123.2, 124.2, 125.2, 126.2]):
        event = event_kit.succeeded(f"job-{number}")
        assert isinstance(event, SucceededEvent)
        data = event.data.model_copy(update={"gpu_seconds": 0.8})
        stored.append(Stored(at_s, event.model_copy(update={"data": data})))
    gaps_s = [9.0, 9.0, 9.0, 0.2, 0.2, 0.4, 0.2, 0.3, 0.3]
    waits = {f"job-{number}": (gap_s, 0.001) for number, gap_s in enumerate(gaps_s)}
    figures = Run(5.0, stored, waits).summary()
    assert figures["images_per_s"] == pytest.approx(5 / 5.2, abs=1e-4)
    assert figures["job_to_job_s"]["max"] == 1.2
    assert figures["gpu_idle_percent"] == 25.0
    assert figures["gpu_handover_ms"]["p50"] == 1.0
    assert set(figures["latency_s"]) == {"queued", "prepare", "generate", "encode", "upload", "total"}


@pytest.mark.parametrize(
    ("workload", "ranks"),
    [
        ("all-different", [32, 32, 32, 32, 32, 32]),
        ("one-in-three-without", [32, 32, None, 32, 32, None]),
        ("mixed-ranks", [8, 16, 32, 64, 128, 8]),
        ("same", [32, 32, 32, 32, 32, 32]),
    ],
)
def test_each_workload_has_its_loras(workload: str, ranks: list[int | None]) -> None:
    assert ranks_of(workload, 6, 32) == ranks


def test_the_defaults_are_what_is_asked_of_one_gpu() -> None:
    options = parse(["--model", "sdxl"])
    assert (options.jobs, options.serial_jobs, options.rank, options.mb_per_s) == (60, 20, 32, 100.0)
    assert (options.size, options.steps, options.dtype, options.prefetch) == ("1024x1024", 28, "float16", 1)


def test_the_environment_says_where_it_was_measured() -> None:
    found = environment(["numpy", "not-installed"])
    assert found["versions"] == {"numpy": np.__version__, "not-installed": None}
    assert found["cores"] >= 1
    assert found["cpu"]
