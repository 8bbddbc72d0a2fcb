"""Pictures of the tiny model, against the stock pipeline with the deltas merged into its weights by hand."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLPipeline

from consumer.engine import GeneratedImage, LoraFile, Pixels, PreparedLoras
from consumer.engine.common import seeded
from consumer.engine.stock import StockEngine
from consumer.lora.shapes import lora_modules, lora_parameters
from consumer.pipeline import noise
from demo import loras
from schemas.lora.shapes import ModelShapes
from schemas.requests import GenerationRequest, LoraRef

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # diffusers' scheduler and numpy 2.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

SETTINGS: dict[str, Any] = {"rank": 4, "alpha": 2.0, "strength": 0.6}
SCALE = 0.8
Merged = Mapping[str, torch.Tensor]


class Stopped(Exception):
    """Ends a picture after its first step."""


def ignore_steps(step: int, total: int) -> None:
    """The callback of a test that looks at pictures only."""


def stop(step: int, total: int) -> None:
    raise Stopped


def a_request(**fields: Any) -> GenerationRequest:
    """A picture smaller and of fewer steps than a client may ask for: enough to compare, and quick."""
    defaults = {"job_id": "job-1", "prompt": "a red flower", "seed": 1}
    small = {"width": 256, "height": 256, "steps": 3}
    return GenerationRequest.model_validate(defaults).model_copy(update=small | fields)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> StockEngine:
    return StockEngine.load(str(tiny_model), device="cpu", dtype="float32")


class Stock:
    """diffusers' pipeline as it is; LoRAs are added to its weights with plain arithmetic and taken off with copies."""

    def __init__(self, folder: Path) -> None:
        self.pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
        self.pipeline.set_progress_bar_config(disable=True)
        for _, parameter in lora_parameters(self.pipeline):
            parameter.data = parameter.data.clone()  # in aligned memory, where the CPU's kernels add in the same order

    def draw(self, request: GenerationRequest, changes: Merged | None = None) -> Pixels:
        modules = dict(lora_modules(self.pipeline))
        kept = {name: modules[name].weight.detach().clone() for name in changes or {}}
        with torch.no_grad():
            for name, change in (changes or {}).items():
                modules[name].weight += change.view(modules[name].weight.shape).float()
        image = self.pipeline(
            request.prompt,
            negative_prompt=request.negative_prompt or None,
            width=request.width,
            height=request.height,
            num_inference_steps=request.steps,
            guidance_scale=request.cfg,
            generator=torch.Generator("cpu").manual_seed(request.effective_seed),
        ).images[0]
        with torch.no_grad():
            for name, weight in kept.items():
                modules[name].weight.copy_(weight)
        return np.asarray(image)


@pytest.fixture(scope="module")
def stock(tiny_model: Path) -> Stock:
    return Stock(tiny_model)


@pytest.fixture(scope="module")
def steps() -> list[tuple[int, int]]:
    """What `plain` was told of its steps."""
    return []


@pytest.fixture(scope="module")
def plain(engine: StockEngine, steps: list[tuple[int, int]]) -> GeneratedImage:
    return engine.generate(a_request(), PreparedLoras(), lambda step, total: steps.append((step, total)))


def changes_of(modules: loras.Modules, seed: int, scale: float = SCALE) -> Merged:
    drawn = loras.deltas(modules, seed=seed, **SETTINGS)
    factor = scale * SETTINGS["alpha"] / SETTINGS["rank"]
    return {name: factor * (up.flatten(1).double() @ down.flatten(1).double()) for name, (down, up) in drawn.items()}


def draw(engine: StockEngine, *files: Path, scale: float = SCALE, **fields: Any) -> GeneratedImage:
    prepared = engine.prepare([LoraFile(path, LoraRef(key=f"loras/{path.name}", scale=scale)) for path in files])
    return engine.generate(a_request(**fields), prepared, ignore_steps)


def levels_apart(one: Pixels, other: Pixels) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def test_a_plain_picture_is_the_stock_pipelines(
    plain: GeneratedImage, stock: Stock, steps: list[tuple[int, int]]
) -> None:
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert plain.pixels.shape == (256, 256, 3)
    assert plain.pixels.dtype == np.uint8
    assert levels_apart(plain.pixels, stock.draw(a_request())) == 0
    assert plain.loras == ()
    assert plain.warnings == ()
    assert plain.sampler == "Euler"
    assert plain.seconds > 0


def test_an_oblong_picture_without_guidance_and_of_a_long_prompt_is_the_stock_pipelines(
    engine: StockEngine, stock: Stock
) -> None:
    fields: dict[str, Any] = {"width": 384, "prompt": "red sea " * 60, "cfg": 1.0}
    image = draw(engine, **fields)
    assert image.pixels.shape == (256, 384, 3)
    assert levels_apart(image.pixels, stock.draw(a_request(**fields))) == 0
    assert image.warnings == ("prompt has 122 tokens and was cut at 77",)


def test_a_lora_in_any_naming_is_the_merged_one_and_a_scale_of_nothing_gives_the_base_picture(
    engine: StockEngine, stock: Stock, shapes: ModelShapes, plain: GeneratedImage, tmp_path: Path
) -> None:
    modules = {name: shape for name, shape in shapes.weights.items() if name.startswith("unet.")}
    peft = draw(engine, loras.write_peft(tmp_path / "peft", modules, seed=1, **SETTINGS))
    assert levels_apart(peft.pixels, stock.draw(a_request(), changes_of(modules, seed=1))) <= 1
    assert levels_apart(peft.pixels, plain.pixels) > 20
    assert [(lora.name, lora.scale, lora.modules) for lora in peft.loras] == [("peft", SCALE, len(modules))]
    for naming in ("sgm", "diffusers"):
        file = loras.write_kohya(tmp_path / naming, modules, shapes, seed=1, naming=naming, **SETTINGS)
        assert np.array_equal(draw(engine, file).pixels, peft.pixels)
    unscaled = draw(engine, file, scale=0.0)
    assert np.array_equal(unscaled.pixels, plain.pixels)
    assert unscaled.loras[0].modules == 0


def test_text_encoder_parts_are_merged_and_leave_no_trace(
    engine: StockEngine, stock: Stock, shapes: ModelShapes, plain: GeneratedImage, tmp_path: Path
) -> None:
    modules = {name: shape for name, shape in shapes.weights.items() if name.startswith("text_encoder")}
    file = loras.write_kohya(tmp_path / "text", modules, shapes, seed=2, **SETTINGS)
    text = draw(engine, file, negative_prompt="blurry")
    merged = stock.draw(a_request(negative_prompt="blurry"), changes_of(modules, seed=2))
    assert levels_apart(text.pixels, merged) <= 1
    assert levels_apart(text.pixels, stock.draw(a_request(negative_prompt="blurry"))) > 20
    assert np.array_equal(draw(engine).pixels, plain.pixels)


def test_a_partial_lora_after_a_full_one_is_as_if_alone(
    engine: StockEngine, stock: Stock, shapes: ModelShapes, tmp_path: Path
) -> None:
    part = {name: shape for name, shape in shapes.weights.items() if "mid_block" in name or "attn2" in name}
    full = loras.write_peft(tmp_path / "full", shapes.weights, seed=3, **SETTINGS)
    partial = loras.write_peft(tmp_path / "partial", part, seed=4, **SETTINGS)
    with pytest.raises(Stopped):
        engine.generate(a_request(), engine.prepare([LoraFile(full, LoraRef(key="full"))]), stop)
    alone = draw(engine, partial)
    assert levels_apart(alone.pixels, stock.draw(a_request(), changes_of(part, seed=4))) <= 1


def test_prompt_and_seed_are_visible(engine: StockEngine, plain: GeneratedImage) -> None:
    for fields in ({"seed": 2}, {"prompt": "mountains at night"}):
        image = draw(engine, **fields)
        assert np.abs(image.pixels.astype(int) - plain.pixels).mean() > 4


def test_a_missing_seed_is_the_jobs_and_noise_is_drawn_in_float32(stock: Stock) -> None:
    unseeded = a_request(seed=None, width=768, height=512)
    start = noise(stock.pipeline, unseeded, seeded(unseeded))
    assert start.shape == (1, 4, 64, 96)
    for seed, same in ((unseeded.effective_seed, True), (1, False)):
        request = a_request(seed=seed, width=768, height=512)
        assert torch.equal(start, noise(stock.pipeline, request, seeded(request))) is same
    generator = torch.Generator("cpu").manual_seed(unseeded.effective_seed)
    assert torch.equal(start, torch.randn(1, 4, 64, 96, generator=generator, dtype=torch.float32))


def test_a_scheduler_that_draws_noise_at_every_step_is_seeded_too(tiny_model: Path) -> None:
    engine = StockEngine.load(str(tiny_model), device="cpu", dtype="float32")
    scheduler = engine.painter.pipeline.scheduler
    engine.painter.pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(scheduler.config)
    first, second = (draw(engine) for _ in range(2))
    assert np.array_equal(first.pixels, second.pixels)
