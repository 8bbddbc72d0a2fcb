"""What goes wrong while loading, preparing and drawing, and that the engine draws on afterwards."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from consumer.engine import LoraFile, PreparedLoras
from consumer.engine.common import describe
from consumer.engine.stock import StockEngine
from consumer.errors import (
    AttemptTimeout,
    GenerationFailed,
    GpuOutOfMemory,
    JobCancelled,
    LoraInvalid,
    ModelBroken,
    WeightsChanged,
)
from consumer.lora.deltas import ParsedLora
from consumer.lora.weights import PatchableWeights
from consumer.pipeline import decode, load_pipeline
from demo import loras
from schemas.events import AppliedLora
from schemas.requests import GenerationRequest, LoraRef

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # diffusers' scheduler and numpy 2.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

SMALL = {"width": 256, "height": 256, "steps": 3}  # less than a client may ask for, and quicker
REQUEST = GenerationRequest(job_id="job-1", prompt="a red flower", seed=1).model_copy(update=SMALL)


class Stopped(Exception):
    """Ends a picture after its first step."""


def stop(step: int, total: int) -> None:
    raise Stopped(f"{step}/{total}")


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path) -> Any:
    return load_pipeline(str(tiny_model), None, torch.device("cpu"), torch.float32, None)


@pytest.fixture(scope="module")
def engine(pipeline: Any) -> StockEngine:
    return StockEngine(pipeline, "tiny-sdxl")


@pytest.fixture(scope="module")
def prepared(engine: StockEngine, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedLoras:
    path = tmp_path_factory.mktemp("loras") / "full.safetensors"
    loras.write_peft(path, loras.shapes_of(tiny_model).weights, seed=1, strength=0.5)
    return engine.prepare([LoraFile(path, LoraRef(key="loras/full.safetensors"))])


@pytest.fixture
def files_weights(tiny_model: Path) -> Callable[[Any], int]:
    """Counts the UNet's weights that are not those in the file."""
    stored = load_file(tiny_model / "unet" / "diffusion_pytorch_model.safetensors")
    return lambda pipeline: sum(int((w != stored[name]).sum()) for name, w in pipeline.unet.state_dict().items())


@contextmanager
def failing(module: torch.nn.Module, error: Exception) -> Iterator[None]:
    """Every call of the module raises."""

    def hook(*_: Any) -> None:
        raise error

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_the_engine_says_what_it_draws_with(tiny_model: Path, engine: StockEngine) -> None:
    loaded = StockEngine.load(str(tiny_model), device="cpu", dtype="bfloat16")
    assert (loaded.base_model, loaded.gpu) == ("tiny-sdxl", "cpu")
    assert engine.base_model == "tiny-sdxl"


def test_another_autoencoder_can_be_put_in(tiny_model: Path) -> None:
    StockEngine.load(str(tiny_model), vae=str(tiny_model / "vae"), device="cpu", dtype="float32")
    with pytest.raises(ModelBroken):
        StockEngine.load(str(tiny_model), vae=str(tiny_model / "unet"), device="cpu", dtype="float32")


def test_a_half_precision_autoencoder_that_overflows_decodes_in_float32(tiny_model: Path) -> None:
    pipeline = load_pipeline(str(tiny_model), None, torch.device("cpu"), torch.float16, None)
    assert pipeline.vae.dtype == torch.float32
    assert pipeline.unet.dtype == pipeline.text_encoder_2.dtype == torch.float16


def test_a_model_of_pickles_is_not_loaded(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ModelBroken):
        StockEngine.load(str(folder), device="cpu", dtype="float32")


@pytest.mark.parametrize("missing", ["model_index.json", "unet/config.json", "text_encoder/model.safetensors"])
def test_a_model_with_a_part_missing_is_broken_and_no_path_is_told(
    tiny_model: Path, tmp_path: Path, missing: str
) -> None:
    folder = tmp_path / "partial"
    shutil.copytree(tiny_model, folder)
    (folder / missing).unlink()
    with pytest.raises(ModelBroken) as failure:
        StockEngine.load(str(folder), device="cpu", dtype="float32")
    assert str(tmp_path) not in str(failure.value)


def test_a_model_of_another_architecture_is_broken(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(tiny_model, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "text_encoder_2"}))
    with pytest.raises(ModelBroken):
        StockEngine.load(str(folder), device="cpu", dtype="float32")


def test_preparing_touches_no_weight_and_tells_what_was_skipped(
    engine: StockEngine, pipeline: Any, tiny_model: Path, tmp_path: Path
) -> None:
    shapes = loras.shapes_of(tiny_model)
    modules = {"unet.conv_in": shapes.weights["unet.conv_in"], "unet.no.such": (4, 4)}
    path = loras.write_peft(tmp_path / "x", modules, seed=1, strength=0.5)
    before = {name: parameter.clone() for name, parameter in pipeline.unet.named_parameters()}
    ref = LoraRef(url="https://host.example/loras/ink.safetensors?X-Amz-Signature=s", scale=0.5, version="v2")
    prepared = engine.prepare([LoraFile(path, ref)])
    assert all(torch.equal(parameter, before[name]) for name, parameter in pipeline.unet.named_parameters())
    applied = AppliedLora(name="ink.safetensors", version="v2", scale=0.5, modules=1, skipped=3)
    assert prepared.applied == (applied,)
    assert prepared.warnings[0].startswith("ink.safetensors: 3 tensors match nothing in the model: unet.no.such.")


def test_a_lora_that_is_none_is_refused_when_prepared(engine: StockEngine, tmp_path: Path) -> None:
    with pytest.raises(LoraInvalid):
        engine.prepare([LoraFile(loras.write_sd15(tmp_path / "sd15"), LoraRef(key="sd15"))])


@pytest.mark.parametrize(
    "error", [JobCancelled("running"), AttemptTimeout("too long"), OSError("no"), KeyboardInterrupt()]
)
def test_what_a_step_raises_passes_through_and_the_next_picture_is_exact(
    engine: StockEngine,
    pipeline: Any,
    prepared: PreparedLoras,
    files_weights: Callable[[Any], int],
    error: BaseException,
) -> None:
    def on_step(step: int, total: int) -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        engine.generate(REQUEST, prepared, on_step)
    assert raised.value is error
    with pytest.raises(Stopped, match="1/3"):
        engine.generate(REQUEST, PreparedLoras(), stop)
    assert files_weights(pipeline) == 0


def test_a_full_gpu_is_told_as_one_and_the_weights_are_restored(
    engine: StockEngine, pipeline: Any, prepared: PreparedLoras, files_weights: Callable[[Any], int]
) -> None:
    with (
        failing(pipeline.unet, torch.cuda.OutOfMemoryError("CUDA out of memory")),
        pytest.raises(GpuOutOfMemory) as full,
    ):
        engine.generate(REQUEST, prepared, stop)
    assert full.value.__context__ is None  # a traceback would keep what filled the memory
    assert files_weights(pipeline) == 0


def test_a_failing_model_is_a_failed_generation_without_paths_or_secrets(
    engine: StockEngine, pipeline: Any, prepared: PreparedLoras, files_weights: Callable[[Any], int]
) -> None:
    error = RuntimeError("broken at /root/models/unet.py: https://host.example/m?token=abc")
    with failing(pipeline.unet, error), pytest.raises(GenerationFailed) as failed:
        engine.generate(REQUEST, prepared, stop)
    assert str(failed.value) == "Inference failed: RuntimeError: broken at [path]: https://host.example/m"
    assert files_weights(pipeline) == 0


def test_a_failure_while_patching_is_a_failed_generation(
    engine: StockEngine,
    pipeline: Any,
    prepared: PreparedLoras,
    files_weights: Callable[[Any], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no kernel")

    engine.painter.weights.patch(engine.painter.weights.prepare([]))
    monkeypatch.setattr(engine.painter.weights, "_patch_rows", fail)
    with pytest.raises(GenerationFailed, match="no kernel"):
        engine.generate(REQUEST, prepared, stop)
    assert files_weights(pipeline) == 0


def test_a_device_that_is_lost_is_a_broken_model(engine: StockEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    weights = PatchableWeights.__new__(PatchableWeights)
    monkeypatch.setattr(weights, "patch", lambda loras: lost(), raising=False)
    monkeypatch.setattr(weights, "restore", lost, raising=False)
    monkeypatch.setattr(engine.painter, "weights", weights)
    with pytest.raises(ModelBroken, match="illegal memory access"):
        engine.generate(REQUEST, PreparedLoras(), stop)


def test_a_device_that_is_lost_while_a_lora_is_read_is_a_broken_model(
    engine: StockEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards `consumer.engine.preparing.prepare`."""
    with pytest.raises(ModelBroken, match="The device is lost"):
        prepare_with(
            torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), engine, monkeypatch
        )


def test_a_gpu_that_is_too_full_for_a_lora_is_told_as_one(engine: StockEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards `consumer.engine.preparing.prepare`."""
    with pytest.raises(GpuOutOfMemory, match="for the LoRAs"):
        prepare_with(torch.OutOfMemoryError("CUDA out of memory"), engine, monkeypatch)


def test_a_lora_that_finds_no_room_is_tried_once_more_when_the_picture_is_drawn_and_memory_is_given_back(
    engine: StockEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards `PaintingEngine.prepare`: what recordings keep can be given back between two pictures alone."""
    told: list[str] = []
    waiting: list[Future[PreparedLoras]] = []

    def fail_once(deltas: object) -> None:
        told.append("prepare")
        if told.count("prepare") == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def on_step(step: int, total: int) -> None:
        if not waiting:
            waiting.append(beside.submit(engine.prepare, [LoraFile(Path("x"), LoraRef(key="x.safetensors"))]))
        time.sleep(0.05)  # long enough for a thread that does not wait
        told.append(f"step {step}")

    monkeypatch.setattr("consumer.engine.preparing.parse", lambda *_: ParsedLora(()))
    monkeypatch.setattr(engine.painter.weights, "prepare", fail_once)
    monkeypatch.setattr(engine.painter, "release", lambda: told.append("give back"))
    with ThreadPoolExecutor(1) as beside:
        engine.generate(REQUEST, PreparedLoras(), on_step)
        assert waiting[0].result().patch is None
    assert told == ["prepare", "step 1", "step 2", "step 3", "give back", "prepare"]


def prepare_with(error: Exception, engine: StockEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("consumer.engine.preparing.parse", lambda *_: ParsedLora(()))
    monkeypatch.setattr(engine.painter.weights, "prepare", fail)
    engine.prepare([LoraFile(Path("x.safetensors"), LoraRef(key="x.safetensors"))])


def test_a_picture_of_weights_that_changed_in_memory_is_not_given_out_and_everything_is_restored(
    engine: StockEngine, pipeline: Any, prepared: PreparedLoras, files_weights: Callable[[Any], int]
) -> None:
    """One flipped bit of a weight that no LoRA patches. Guards `sample` and `check` around a picture."""
    weights = engine.painter.weights
    name = "unet.conv_norm_out.weight"
    bits = pipeline.unet.conv_norm_out.weight.data.view(torch.int32)

    def flip(step: int, total: int) -> None:
        if step == total:
            bits[0] ^= 1
            weights._next = weights._order.index(weights._places[name])

    with pytest.raises(WeightsChanged, match="1 of the model's parameters"):
        engine.generate(REQUEST, prepared, flip)
    assert weights.changed() == []
    assert files_weights(pipeline) == 0


@pytest.mark.parametrize("bias", [float("nan"), float("inf"), -1e3])
def test_a_nan_or_black_image_is_a_failed_generation(pipeline: Any, bias: float) -> None:
    last = pipeline.vae.decoder.conv_out.bias
    kept = last.detach().clone()
    try:
        with torch.no_grad():
            last.fill_(bias)
        with pytest.raises(GenerationFailed, match="black" if bias < 0 else "NaN"):
            decode(pipeline, torch.randn(1, 4, 8, 8))
    finally:
        with torch.no_grad():
            last.copy_(kept)


def test_latents_with_statistics_of_their_own_are_unscaled_as_the_stock_pipeline_does(pipeline: Any) -> None:
    vae, latents = pipeline.vae, torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 1.5]
    by_hand = latents * torch.tensor(std).view(1, 4, 1, 1) + torch.tensor(mean).view(1, 4, 1, 1) * 0.13025
    expected = decode(pipeline, by_hand)
    kept = vae.config.latents_mean, vae.config.latents_std
    vae.register_to_config(latents_mean=mean, latents_std=std)
    try:
        assert np.abs(decode(pipeline, latents).astype(int) - expected).max() <= 1
    finally:
        vae.register_to_config(latents_mean=kept[0], latents_std=kept[1])


def test_warming_up_draws_and_a_model_that_cannot_is_broken(engine: StockEngine, pipeline: Any) -> None:
    engine.warm_up()
    with failing(pipeline.unet, RuntimeError("no kernel")), pytest.raises(ModelBroken, match="no kernel"):
        engine.warm_up()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("no file /home/me/.cache/x.bin here", "no file [path] here"),
        ("'/a/b c'", "'[path] c'"),
        ("shapes 3/4 and a/b stay", "shapes 3/4 and a/b stay"),
        ("see https://hub.example/api/x?token=s", "see https://hub.example/api/x"),
    ],
)
def test_errors_of_libraries_are_told_without_paths(text: str, told: str) -> None:
    assert describe(ValueError(text)) == f"ValueError: {told}"
