"""The engines' benchmark on the tiny model: what it measures is the same picture by every engine."""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import engine as benchmark
from benchmarks import quality
from benchmarks.gpu_sampler import parse_samples
from benchmarks.lora_files import LoraWriter, attention_layers
from benchmarks.our_engine import Ours
from benchmarks.usual_engines import AsPeopleUseIt, HotSwapped, WellSetUp
from benchmarks.workload import Laps, Workload, size
from consumer.engine import Engine, GeneratedImage, LoraFile, OnStep, Pixels, PreparedLoras
from consumer.engine.fast.engine import FastEngine
from consumer.engine.stock import StockEngine
from consumer.errors import ModelBroken
from schemas.requests import GenerationRequest

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # diffusers' scheduler and numpy 2
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


class ToldEngine:
    """Tells what it was asked for, in order, and draws grey. `level`: of the grey."""

    base_model = "told"
    gpu = "none"
    timings: dict[str, float]

    def __init__(self, level: int = 100) -> None:
        self.level = level
        self.prepared: list[str] = []
        self.scales: list[float] = []
        self.drawn: list[int] = []
        self.timings = {"patch": 0.25, "text": 0.5}

    def prepare(self, files: Sequence[LoraFile]) -> PreparedLoras:
        self.prepared += [file.path.name for file in files]
        self.scales += [file.ref.scale for file in files]
        return PreparedLoras()

    def generate(self, request: GenerationRequest, loras: PreparedLoras, on_step: OnStep) -> GeneratedImage:
        self.drawn.append(request.effective_seed)
        return GeneratedImage(np.full((request.height, request.width, 3), self.level, np.uint8), 0.0)

    def warm_up(self) -> None:
        pass


class SmallWorkload(Workload):
    """Its pictures are smaller and of fewer steps than a client may ask for: enough to compare, and quick."""

    def request(self, number: int) -> GenerationRequest:
        return super().request(number).model_copy(update={"width": 256, "height": 256, "steps": 3})


@pytest.fixture(scope="module")
def work(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Workload:
    """Four small pictures; the first one warms up."""
    writer = LoraWriter(attention_layers(tiny_model), strength=0.5)
    loras = writer.write_all(tmp_path_factory.mktemp("loras"), [4] * 4)
    return SmallWorkload(tiny_model, loras, 1, "cpu", "float32", speed="stock", rank=4)


@pytest.fixture(scope="module")
def stock(work: Workload) -> Engine:
    return StockEngine.load(str(work.model), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def ours(work: Workload, stock: Engine) -> tuple[Pixels, dict[str, float]]:
    """The second picture by our stock engine, and its parts."""
    contender = Ours(work, lambda *_: stock)
    parts = contender.draw(1)
    return contender.pixels, parts


def levels_apart(one: Pixels, other: Pixels) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


FUSED = ["load", "fuse", "set-up", "text", "denoise", "decode", "png", "unfuse", "unload"]
SWAPPED = ["load", "set-up", "text", "denoise", "decode", "png"]


@pytest.mark.parametrize(
    ("usual", "named"),
    [(AsPeopleUseIt, FUSED), (WellSetUp, FUSED), (HotSwapped, SWAPPED)],
    ids=["as-people-use-it", "well-set-up", "hot-swapped"],
)
def test_the_usual_engines_draw_our_picture(
    usual: type[AsPeopleUseIt], named: list[str], work: Workload, ours: tuple[Pixels, dict[str, float]]
) -> None:
    """Guards the scale, the seed and the prompts of `_picture`: engines that draw different things do not compare."""
    with torch.compiler.set_stance("force_eager"):  # to compile takes minutes
        contender = usual(work)
        contender.draw(0)
        parts = contender.draw(1)  # after another LoRA
    assert levels_apart(contender.pixels, ours[0]) <= 1
    assert list(parts) == named
    assert all(seconds > 0 for seconds in parts.values())


def test_our_parts_are_the_whole_picture(work: Workload, stock: Engine) -> None:
    """Guards the laps of `Ours.draw`."""
    contender = Ours(work, lambda *_: stock)
    began = time.perf_counter()
    parts = contender.draw(1)
    took = time.perf_counter() - began
    assert contender.pixels.shape == (256, 256, 3)
    assert next(iter(parts)) == "prepare"
    assert list(parts)[-1] == "png"
    assert took / 2 < sum(parts.values()) <= took


def test_the_fast_engine_draws_our_picture(work: Workload, ours: tuple[Pixels, dict[str, float]]) -> None:
    fast = FastEngine.load(str(work.model), device="cpu", dtype="float32")
    contender = Ours(work, lambda *_: fast)
    contender.draw(1)
    assert levels_apart(contender.pixels, ours[0]) <= 2


def test_our_engine_is_the_one_that_a_consumer_would_load(work: Workload, tmp_path: Path) -> None:
    with pytest.raises(ModelBroken, match="cannot be loaded"):
        Ours(replace(work, model=tmp_path / "none"))


def test_an_engine_that_times_itself_is_told_in_its_parts(work: Workload) -> None:
    contender = Ours(work, lambda *_: ToldEngine())
    parts = contender.draw(2)
    assert list(parts) == ["prepare", "patch", "text", "rest", "png"]
    assert (parts["patch"], parts["text"]) == (0.25, 0.5)
    pieces = contender.switch(2)
    assert list(pieces) == ["read", "parse", "prepare", "patch", "restore"]
    assert pieces["restore"] == [0.25, 0.25]


def test_sustained_draws_every_lora_once_and_leaves_the_warm_ups_out(work: Workload) -> None:
    """Guards the slice of `sustained`: from the last warm-up's end on there is an interval for each picture."""
    told = ToldEngine()
    intervals = Ours(work, lambda *_: told).sustained()
    assert told.drawn == [0, 1, 2, 3]
    assert told.prepared[:4] == [path.name for path in work.loras]
    assert len(intervals) == 3


def test_a_result_has_its_figures_and_a_broken_engine_loses_no_other(
    work: Workload, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(workload: Workload) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(benchmark.CONTENDERS, "B", broken)
    monkeypatch.setitem(benchmark.CONTENDERS, "D", lambda workload: Ours(workload, lambda *_: ToldEngine()))
    arguments = benchmark.parse_arguments(["--model", str(work.model), "--only", "B,D"])
    failed, serial, sustained, switch = benchmark.measured(arguments, work)
    assert failed == {"engine": "B", "mode": "failed", "error": "RuntimeError"}
    assert "no such kernel" in capsys.readouterr().err
    assert serial["seconds"]["n"] == sustained["seconds"]["n"] == 3
    assert serial["tflop_per_s"] == pytest.approx(serial["tflop"] / serial["seconds"]["p50"], rel=0.1)
    assert switch["class"] == "ToldEngine"
    assert switch["parts"]["patch"]["p50"] == 0.25


@pytest.mark.parametrize(("name", "status"), [("B", 1), ("D", 0)], ids=["broken", "sound"])
def test_a_broken_engine_is_told_by_the_exit_status(
    work: Workload, monkeypatch: pytest.MonkeyPatch, name: str, status: int
) -> None:
    monkeypatch.setitem(benchmark.CONTENDERS, "D", lambda workload: Ours(workload, lambda *_: ToldEngine()))
    monkeypatch.setattr(benchmark, "workload_of", lambda arguments, folder: work)
    monkeypatch.setitem(benchmark.CONTENDERS, "B", lambda workload: 1 / 0)
    assert benchmark.main(["--model", str(work.model), "--only", name]) == status


def test_pictures_of_half_precision_are_compared_with_stock_float32(work: Workload) -> None:
    asked: list[tuple[str, str]] = []
    engines: list[ToldEngine] = []

    def load(workload: Workload, speed: str, dtype: str) -> Engine:
        asked.append((speed, dtype))
        engines.append(ToldEngine(100 if speed == "stock" else 110))
        return engines[-1]

    compared = list(quality.compare(replace(work, speed="fast", dtype="float16"), [(512, 512)], load))
    assert asked == [("stock", "float32"), ("stock", "float16"), ("fast", "float16")]
    assert [one["engine"] for one in compared] == ["stock float16", "fast float16", "fast float16, LoRA at 7/8"]
    assert [engine.scales for engine in engines] == [[0.8], [0.8], [0.8, pytest.approx(0.7)]]
    equal, other, _ = compared
    assert (equal["size"], equal["psnr_db"], equal["max_difference"]) == ("512x512", None, 0)
    assert equal["ssim"] == 1.0
    assert (other["psnr_db"], other["max_difference"], other["mean_difference"]) == (28.13, 10, 10.0)
    assert other["ssim"] < 1.0


def noise() -> Iterator[Pixels]:
    random = np.random.default_rng(1)
    truth = random.integers(30, 220, (40, 50, 3), np.uint8)
    yield truth
    yield (truth + random.integers(-20, 20, truth.shape)).astype(np.uint8)


def test_likeness_is_by_its_formula() -> None:
    """SSIM against each window on its own, in plain numpy; guards `ssim` and `_blurred`."""
    truth, other = noise()
    taps = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(taps, taps) / taps.sum() ** 2
    found = []
    for channel in range(3):
        for y in range(30):
            for x in range(40):
                a, b = (one[y : y + 11, x : x + 11, channel].astype(float) for one in (truth, other))
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                spread_a, spread_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
                both = (window * (a - mean_a) * (b - mean_b)).sum()
                light = (2 * mean_a * mean_b + 6.5025) / (mean_a**2 + mean_b**2 + 6.5025)
                found.append(light * (2 * both + 58.5225) / (spread_a + spread_b + 58.5225))
    assert quality.ssim(other, truth) == pytest.approx(np.mean(found), abs=1e-9)
    assert quality.ssim(truth, truth) == 1.0


def test_a_difference_of_one_level_everywhere_is_48_db() -> None:
    truth, _ = noise()
    assert quality.apart((truth + 1).astype(np.uint8), truth)["psnr_db"] == 48.13
    # uint8 would wrap around
    assert quality.apart(np.zeros_like(truth), np.full_like(truth, 255))["max_difference"] == 255


def test_float32_is_exact_only_inside_its_block() -> None:
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = True
    with quality.exact_float32():
        assert not matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
    assert matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32
    matmul.allow_tf32 = before


def test_laps_add_up_to_the_whole_time() -> None:
    times = iter([10.0, 11.0, 13.5, 14.0])
    laps = Laps("cpu", clock=lambda: next(times))
    assert laps.end("load") == 1.0
    assert laps.end("draw") == 2.5
    laps.end("load")
    assert laps.seconds == {"load": 1.5, "draw": 2.5}


def test_samples_of_the_gpu_are_medians_of_the_lines_that_are_whole() -> None:
    output = "1410, 688.10\n1980, 120.00\n1420, 690.00\n[N/A], 1\n14"
    assert parse_samples(output) == {"sm_clock_mhz": 1420, "power_w": 688, "samples": 3}
    assert parse_samples("") == {}


def test_a_size_is_one_of_the_contracts() -> None:
    assert size("1536x1024") == (1536, 1024)
    for text in ("1000x1000", "1024", "1024x", "x"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
            size(text)


@pytest.mark.parametrize("words", [["--only", "A,Z"], ["--warm-ups", "0"]], ids=["unknown", "no-warm-up"])
def test_a_command_line_that_measures_nothing_is_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.parse_arguments(["--model", "tiny", *words])
