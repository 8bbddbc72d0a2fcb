"""Pictures of the fast engine, run in plain torch on a CPU, against the stock engine's."""

import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import structlog
import torch

from consumer import triton_support
from consumer.engine import GeneratedImage, LoraFile, Pixels, PreparedLoras
from consumer.engine.fast.engine import FastEngine
from consumer.engine.fast.fields import UnknownModel
from consumer.engine.fast.painter import FastPainter, _ops
from consumer.engine.fast.prompts import MAX_STEPS
from consumer.engine.painting import PaintingEngine
from consumer.engine.protocol import OnStep
from consumer.engine.stock import StockEngine
from consumer.errors import GenerationFailed, GpuOutOfMemory, ModelBroken
from consumer.gpu import GpuThread
from demo import loras
from schemas.lora.shapes import ModelShapes
from schemas.requests import GenerationRequest, LoraRef

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # diffusers' scheduler and numpy 2.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

Engine = FastEngine | StockEngine


class Stopped(Exception):
    """Ends a picture after its first step."""


def a_request(**fields: Any) -> GenerationRequest:
    """A picture smaller and of fewer steps than a client may ask for: enough to compare, and quick."""
    defaults = {"job_id": "job-1", "prompt": "a red flower", "seed": 1}
    small = {"width": 256, "height": 256, "steps": 3}
    return GenerationRequest.model_validate(defaults).model_copy(update=small | fields)


@pytest.fixture(scope="module")
def fast(tiny_model: Path) -> FastEngine:
    return FastEngine.load(str(tiny_model), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def stock(tiny_model: Path) -> StockEngine:
    return StockEngine.load(str(tiny_model), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory, shapes: ModelShapes) -> LoraFile:
    """Of every module there is: what is derived from weights, too, has to follow."""
    path = tmp_path_factory.mktemp("loras") / "whole.safetensors"
    loras.write_peft(path, shapes.weights, rank=4, alpha=2.0, seed=1, strength=0.6)
    return LoraFile(path, LoraRef(key="loras/whole.safetensors", scale=0.8))


def draw(engine: Engine, request: GenerationRequest, *files: LoraFile) -> GeneratedImage:
    return engine.generate(request, engine.prepare(files), lambda step, total: None)


def levels_apart(one: GeneratedImage, other: GeneratedImage) -> int:
    return int(np.abs(one.pixels.astype(int) - other.pixels).max())


@pytest.mark.parametrize(
    "fields",
    [{"width": 384, "negative_prompt": "blue"}, {"height": 384, "cfg": 1.0, "prompt": "red sea " * 60}],
    ids=["oblong with a negative prompt", "without guidance and of a long prompt"],
)
def test_a_picture_is_the_stock_engines(fast: FastEngine, stock: StockEngine, fields: dict[str, Any]) -> None:
    request = a_request(**fields)
    one, other = draw(fast, request), draw(stock, request)
    assert one.pixels.shape == (request.height, request.width, 3)
    assert one.pixels.std() > 5
    assert levels_apart(one, other) <= 1
    assert (one.warnings, one.sampler) == (other.warnings, other.sampler)


def test_a_lora_of_everything_is_the_stock_engines_and_leaves_nothing_behind(
    fast: FastEngine, stock: StockEngine, lora: LoraFile
) -> None:
    base = draw(fast, a_request())
    with_lora = draw(fast, a_request(), lora)
    assert levels_apart(with_lora, draw(stock, a_request(), lora)) <= 1
    assert levels_apart(with_lora, base) > 20
    assert with_lora.loras[0].modules > 100
    assert np.array_equal(draw(fast, a_request()).pixels, base.pixels)
    assert np.array_equal(draw(fast, a_request(), lora).pixels, with_lora.pixels)


def test_a_picture_is_stopped_between_steps_and_the_next_one_is_whole(fast: FastEngine) -> None:
    whole, steps = draw(fast, a_request()), []

    def stop(step: int, total: int) -> None:
        steps.append((step, total))
        raise Stopped

    with pytest.raises(Stopped):
        fast.generate(a_request(), PreparedLoras(), stop)
    assert steps == [(1, 3)]
    assert np.array_equal(draw(fast, a_request()).pixels, whole.pixels)


def test_every_step_is_told_in_order_and_the_parts_are_timed(fast: FastEngine) -> None:
    steps: list[tuple[int, int]] = []
    image = fast.generate(a_request(), PreparedLoras(), lambda step, total: steps.append((step, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert list(fast.timings) == ["patch", "text", "denoise", "decode"]
    assert image.seconds > fast.timings["denoise"] > 0


class TestABrokenDecoder:
    @pytest.fixture
    def painter(self, tiny_model: Path) -> Iterator[FastPainter]:
        with torch.no_grad():
            yield FastPainter.load(str(tiny_model), device="cpu", dtype="float16")

    def test_what_overflows_in_half_precision_is_decoded_in_float32(self, painter: FastPainter) -> None:
        """Guards `FastPainter._picture`: beyond what the divisor can save."""
        for part in ("weight", "bias"):
            painter._vae[f"vae.decoder.conv_in.{part}"] *= 1e8
        broken = FastPainter.__new__(FastPainter)
        broken.__dict__ |= painter.__dict__
        broken._decoder = type(painter._decoder)(painter._vae, painter._vae_config, painter._ops, torch.float16)
        engine = PaintingEngine(broken)
        with structlog.testing.capture_logs() as logs:
            first, second = (draw_with(engine) for _ in range(2))
        assert [entry["event"] for entry in logs] == ["vae.overflow"] * 2
        assert first.pixels.std() > 5
        assert np.array_equal(first.pixels, second.pixels)

    def test_a_picture_that_overflows_changes_nothing_for_the_next(self, painter: FastPainter) -> None:
        """Guards `Canvas.decode_by`."""

        def enlarge(step: int, total: int) -> None:
            if step == total - 1:  # on a CPU the last step is done by then, and the decoding is not
                (canvas,) = painter._canvases.values()
                canvas.latents.mul_(1e5)

        engine = PaintingEngine(painter)
        before = draw_with(engine)
        with structlog.testing.capture_logs() as logs:
            engine.generate(a_request(), PreparedLoras(), enlarge)
        assert [entry["event"] for entry in logs] == ["vae.overflow"]
        assert np.array_equal(draw_with(engine).pixels, before.pixels)

    def test_a_picture_of_latents_that_are_nan_is_refused(self, painter: FastPainter) -> None:
        painter._vae["vae.decoder.conv_in.weight"].fill_(float("nan"))
        painter._decoder = type(painter._decoder)(painter._vae, painter._vae_config, painter._ops, torch.float16)
        with pytest.raises(GenerationFailed, match="NaN"):
            draw_with(PaintingEngine(painter))


def draw_with(engine: PaintingEngine) -> GeneratedImage:
    """Small and of one step: a CPU is slow in half precision."""
    request = a_request().model_copy(update={"width": 256, "height": 256, "steps": 1})
    return engine.generate(request, PreparedLoras(), lambda step, total: None)


def test_a_model_that_it_does_not_know_is_refused_as_such_and_a_broken_one_is_broken(
    tiny_model: Path, tmp_path: Path
) -> None:
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(UnknownModel, match="StableDiffusionPipeline"):
        FastEngine.load(str(unknown), device="cpu", dtype="float32")
    with pytest.raises(ModelBroken):
        FastEngine.load(str(tmp_path / "nothing"), device="cpu", dtype="float32")
    with pytest.raises(UnknownModel, match="half precision"):
        FastEngine.load(str(tiny_model), device="cuda", dtype="float32")


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 9), False), ((9, 0), True), ((10, 0), True), ((12, 0), False)],
    ids=["Ada", "Hopper", "B200", "RTX 50"],
)
def test_tiles_by_descriptors_are_for_gpus_with_the_shared_memory_for_them(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: bool
) -> None:
    """Guards `consumer.engine.fast.painter._ops`: a tile takes 224 KiB, and what is no data centre's has 99."""
    pytest.importorskip("triton")
    gpu = SimpleNamespace(major=capability[0], multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert vars(_ops(torch.device("cuda")))["_has_descriptors"] is expected


def stop(step: int, total: int) -> None:
    raise Stopped


def run_out_of_memory(*_: object) -> Pixels:
    raise torch.OutOfMemoryError


def go_on(step: int, total: int) -> None:
    """Nothing to stop for."""


@pytest.mark.usefixtures("no_garbage_collection")
@pytest.mark.parametrize(("on_step", "raised"), [(stop, Stopped), (go_on, GpuOutOfMemory)], ids=["stopped", "memory"])
async def test_after_a_failure_nothing_of_a_picture_is_kept_and_the_next_one_is_whole(
    fast: FastEngine, lora: LoraFile, monkeypatch: pytest.MonkeyPatch, on_step: OnStep, raised: type[Exception]
) -> None:
    """Guards `FastPainter.release`, `Captured` and `GpuThread._draw`: while one graph is kept, so is all memory."""
    whole = draw(fast, a_request())
    painter = fast.painter
    prepared = fast.prepare([lora])
    assert prepared.patch is not None
    memory = (*painter._canvases.values(), *painter._prompts.values(), prepared.patch.tensors[0])
    kept: list[weakref.ref[Any]] = [weakref.ref(one) for one in memory]
    pictures = [partial(fast.generate, a_request(), prepared, on_step)]
    del memory, prepared
    gpu = GpuThread()
    with monkeypatch.context() as patch:
        if raised is GpuOutOfMemory:
            patch.setattr(FastPainter, "_picture", run_out_of_memory)
        with pytest.raises(raised):
            await gpu.draw(pictures.pop(), ready_at=0.0)
    await gpu.draw(lambda: None, ready_at=0.0)  # the thread, too, has let go of the one before then
    painter.release()
    assert [one() for one in kept if one() is not None] == []
    assert np.array_equal(draw(fast, a_request()).pixels, whole.pixels)


def test_after_the_longest_picture_kernels_can_be_made_ready_again(fast: FastEngine) -> None:
    """Guards that `Canvas.run_once` goes through the first step: behind the last one there is none."""
    request = a_request(width=64, height=64, steps=MAX_STEPS)
    draw(fast, request)
    canvas, _ = fast.painter._canvas(request)
    with torch.no_grad():
        canvas.run_once()
    assert int(canvas._index) == 1


@pytest.mark.parametrize("missing", ["triton", "compiler"])
def test_without_what_its_kernels_need_it_is_not_for_this_machine(
    tiny_model: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing == "triton":
        monkeypatch.setattr(triton_support, "find_spec", lambda name: None)
    else:
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CC", raising=False)
    assert (triton_support.why_no_triton() or "").lower().find(missing) >= 0
    with pytest.raises(UnknownModel, match="(?i)" + missing):
        FastEngine.load(str(tiny_model), device="cuda", dtype="float16")
