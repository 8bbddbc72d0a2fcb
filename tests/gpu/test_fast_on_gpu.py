"""The fast engine on the whole SDXL architecture with random weights, in float16: graphs, kernels, exact weights."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import full_size
from consumer.engine import GeneratedImage, LoraFile, Pixels, PreparedLoras
from consumer.engine.fast.engine import FastEngine
from consumer.engine.fast.painter import FastPainter
from consumer.engine.stock import StockEngine
from consumer.errors import GpuOutOfMemory, JobCancelled
from demo import loras
from schemas.lora.shapes import ModelShapes
from schemas.requests import GenerationRequest, LoraRef

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

SIDES = (512, 768, 1024, 1344, 1536)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return full_size.write(tmp_path_factory.mktemp("full") / "random-sdxl")


@pytest.fixture(scope="module")
def engine(model: Path) -> FastEngine:
    engine = FastEngine.load(str(model), device="cuda", dtype="float16")
    engine.warm_up()
    return engine


@pytest.fixture(scope="module")
def shapes(engine: FastEngine) -> ModelShapes:
    return engine.painter.shapes


def draw(
    engine: Any, prepared: PreparedLoras, on_step: Any = lambda step, total: None, **fields: Any
) -> GeneratedImage:
    request = {"job_id": "job-1", "prompt": "a red fox", "seed": 7, "steps": 20, "width": 512, "height": 512} | fields
    image: GeneratedImage = engine.generate(GenerationRequest.model_validate(request), prepared, on_step)
    return image


def psnr(one: Pixels, other: Pixels) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.square(one.astype(float) - other).mean())))


def levels_apart(one: GeneratedImage, other: GeneratedImage) -> float:
    return float(np.abs(one.pixels.astype(int) - other.pixels).mean())


@pytest.fixture(scope="module")
def files(shapes: ModelShapes, tmp_path_factory: pytest.TempPathFactory) -> list[LoraFile]:
    """LoRAs of everything, of two layers, of convolutions, of text encoders alone, of many ranks."""
    folder = tmp_path_factory.mktemp("loras")
    names = sorted(shapes.weights)
    chance = random.Random(3)

    def some(*parts: str) -> loras.Modules:
        return {name: shapes.weights[name] for name in names if name.startswith(parts)}

    chosen: list[tuple[loras.Modules, int]] = [
        (shapes.weights, 8),
        (dict(list(loras.attention_modules(shapes).items())[:2]), 32),
        (some("text_encoder.", "text_encoder_2."), 16),
        (loras.attention_modules(shapes), 32),
        (some("unet.up_blocks.0.upsamplers", "unet.up_blocks.1.upsamplers"), 4),
        (some("unet.conv", "unet.time", "unet.add"), 4),
        *(({name: shapes.weights[name] for name in chance.sample(names, 40)}, rank) for rank in (1, 24, 128)),
    ]
    files = []
    for number, (modules, rank) in enumerate(chosen):
        path = folder / f"{number}.safetensors"
        loras.write_peft(path, modules, rank=rank, alpha=rank / 2, seed=number, strength=0.5)
        files.append(LoraFile(path, LoraRef(key=path.name, scale=0.8)))
    return files


@pytest.fixture(scope="module")
def ten(engine: FastEngine, files: list[LoraFile]) -> list[PreparedLoras]:
    """Each of the files, and two at once."""
    return [engine.prepare([file]) for file in files] + [engine.prepare([files[0], files[3]])]


def test_an_hundred_jobs_alternating_ten_loras_and_base_pictures(engine: FastEngine, ten: list[PreparedLoras]) -> None:
    base = draw(engine, PreparedLoras())
    first = [draw(engine, prepared) for prepared in ten]
    for image in first:
        assert levels_apart(image, base) > 0.01
    chance = random.Random(5)
    for _ in range(100):
        number = chance.randrange(len(ten))
        assert np.array_equal(draw(engine, ten[number]).pixels, first[number].pixels)
        assert np.array_equal(draw(engine, PreparedLoras()).pixels, base.pixels)
    assert engine.painter.weights.changed() == []


def test_two_layers_after_everything_and_none_after_the_text_encoders(
    engine: FastEngine, ten: list[PreparedLoras]
) -> None:
    two = draw(engine, ten[1])
    draw(engine, ten[0])
    assert np.array_equal(draw(engine, ten[1]).pixels, two.pixels)
    assert len(engine.painter.weights.changed()) == 2
    draw(engine, ten[2])
    base = draw(engine, PreparedLoras())
    assert engine.painter.weights.changed() == []
    assert levels_apart(base, two) > 0.01


def test_every_size_is_drawn_and_is_the_same_again(engine: FastEngine) -> None:
    for width, height in product(SIDES, SIDES):
        image = draw(engine, PreparedLoras(), width=width, height=height)
        assert image.pixels.shape == (height, width, 3)
        assert image.pixels.std() > 5
    again = draw(engine, PreparedLoras(), width=SIDES[0], height=SIDES[-1], cfg=1.0)
    assert np.array_equal(again.pixels, draw(engine, PreparedLoras(), width=512, height=1536, cfg=1.0).pixels)


@contextmanager
def preparing(engine: FastEngine, file: LoraFile) -> Iterator[None]:
    """Meanwhile two threads prepare a LoRA again and again."""
    is_over = False

    def prepare() -> None:
        while not is_over:
            engine.prepare([file])

    with ThreadPoolExecutor(2) as pool:
        working = [pool.submit(prepare) for _ in range(2)]
        try:
            yield
        finally:
            is_over = True
    for work in working:
        work.result()


def test_graphs_are_recorded_while_loras_are_prepared_and_guidance_and_steps_come_and_go(
    engine: FastEngine, files: list[LoraFile], ten: list[PreparedLoras]
) -> None:
    """Guards `Captured`'s capture_error_mode, and what of a picture before could stay in `Prompts`."""
    jobs: list[dict[str, Any]] = [
        {"width": width, "cfg": cfg, "steps": steps, "prompt": prompt, "negative_prompt": negative}
        for width, cfg, steps, prompt, negative in [
            (512, 5.5, 50, "a red fox", ""),
            (768, 1.0, 20, "a red fox " * 40, ""),
            (768, 5.5, 20, "a blue hare", "fog"),
            (512, 1.0, 35, "x", ""),
            (1344, 5.5, 20, "a red fox", "fog " * 90),
        ]
    ]
    alone = [draw(engine, ten[3], **job) for job in jobs]
    engine.painter.release()
    with preparing(engine, files[0]):
        beside = [draw(engine, ten[3], **job) for job in jobs]
    again = [draw(engine, ten[3], **job) for job in reversed(jobs)]
    for one, other, third in zip(alone, beside, reversed(again), strict=True):
        assert np.array_equal(one.pixels, other.pixels)
        assert np.array_equal(one.pixels, third.pixels)


def test_after_a_failure_the_memory_of_all_graphs_is_given_back(
    engine: FastEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards `FastPainter.release`: what one graph keeps of their pool is kept for all."""

    def fail(*_: object) -> Pixels:
        raise torch.OutOfMemoryError

    base = draw(engine, PreparedLoras())
    with monkeypatch.context() as patch:
        patch.setattr(FastPainter, "_picture", fail)
        with pytest.raises(GpuOutOfMemory):
            draw(engine, PreparedLoras(), width=1536, height=1536)
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    assert unused < 1 << 30
    assert np.array_equal(draw(engine, PreparedLoras()).pixels, base.pixels)


def test_a_picture_cancelled_between_steps_changes_nothing_for_the_next(
    engine: FastEngine, ten: list[PreparedLoras]
) -> None:
    base, steps = draw(engine, PreparedLoras()), []

    def stop(step: int, total: int) -> None:
        steps.append(step)
        if step == 3:
            raise JobCancelled("running")

    with pytest.raises(JobCancelled):
        draw(engine, ten[0], stop)
    assert steps == [1, 2, 3]
    assert np.array_equal(draw(engine, PreparedLoras()).pixels, base.pixels)


def test_pictures_are_the_stock_engines_with_and_without_a_lora(
    engine: FastEngine, files: list[LoraFile], model: Path
) -> None:
    sizes = {"width": 768, "height": 512, "negative_prompt": "blue"}
    jobs: list[list[LoraFile]] = [[], [files[0]]]
    fast = [draw(engine, engine.prepare(job), **sizes) for job in jobs]
    stock = StockEngine.load(str(model), device="cuda", dtype="float16")
    expected = [draw(stock, stock.prepare(job), **sizes) for job in jobs]
    assert psnr(expected[0].pixels, expected[1].pixels) < 40
    for one, other in zip(fast, expected, strict=True):
        assert psnr(one.pixels, other.pixels) > 50
