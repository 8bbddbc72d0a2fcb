"""The whole SDXL architecture with random weights, in float16 on a GPU: exact weights, exact base pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import full_size
from consumer.engine import LoraFile, PreparedLoras
from consumer.engine.stock import StockEngine
from consumer.errors import JobCancelled
from consumer.lora.shapes import model_shapes
from demo import loras
from schemas.requests import GenerationRequest, LoraRef

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    pipeline = full_size.random_pipeline("cuda")
    pipeline.vae.to(torch.float32)  # as a consumer's, which would overflow
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def engine(pipeline: Any) -> StockEngine:
    return StockEngine(pipeline, "random-sdxl")


def draw(engine: StockEngine, prepared: PreparedLoras, on_step: Any = lambda step, total: None) -> Any:
    request = GenerationRequest(job_id="job-1", prompt="a red fox", seed=7, steps=20)
    return engine.generate(request, prepared, on_step)


@pytest.fixture(scope="module")
def prepared(engine: StockEngine, pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> list[PreparedLoras]:
    folder = tmp_path_factory.mktemp("loras")
    shapes = model_shapes(pipeline)
    everything = loras.attention_modules(shapes, text_encoders=True)
    few = dict(list(loras.attention_modules(shapes).items())[:2])
    files: list[Path] = [
        loras.write_peft(folder / "all.safetensors", everything, rank=32, alpha=16.0, seed=1, strength=0.3),
        loras.write_kohya(folder / "few.safetensors", few, shapes, rank=8, alpha=8.0, seed=2, strength=0.3),
    ]
    return [engine.prepare([LoraFile(path, LoraRef(key=path.name))]) for path in files]


def test_base_pictures_are_pixel_equal_whatever_was_drawn_between(
    engine: StockEngine, prepared: list[PreparedLoras]
) -> None:
    base = draw(engine, PreparedLoras())
    assert base.pixels.shape == (1024, 1024, 3)
    with_lora = draw(engine, prepared[0])
    assert with_lora.loras[0].modules > 600
    assert np.abs(with_lora.pixels.astype(int) - base.pixels).mean() > 1
    few = draw(engine, prepared[1])
    assert few.loras[0].modules == 2
    assert np.array_equal(draw(engine, PreparedLoras()).pixels, base.pixels)
    assert np.array_equal(draw(engine, prepared[0]).pixels, with_lora.pixels)


def test_an_hundred_switches_change_no_weight(engine: StockEngine, prepared: list[PreparedLoras]) -> None:
    weights = engine.painter.weights
    for number in range(100):
        chosen = prepared[number % 2]
        assert chosen.patch is not None
        weights.patch(chosen.patch)
    assert len(weights.changed()) == 2
    weights.restore()
    assert weights.changed() == []


def test_fusing_and_unfusing_the_usual_way_changes_weights(pipeline: Any) -> None:
    """The reason for the pristine copies, beside them: W + d - d is not W in float16."""
    weight = pipeline.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q").weight.detach()
    delta = torch.randn(weight.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).half() * 0.01
    assert not torch.equal((weight + delta) - delta, weight)


def test_a_job_stopped_between_steps_leaves_the_engine_usable(
    engine: StockEngine, prepared: list[PreparedLoras]
) -> None:
    base = draw(engine, PreparedLoras())

    def stop(step: int, total: int) -> None:
        if step == 3:
            raise JobCancelled("running")

    with pytest.raises(JobCancelled):
        draw(engine, prepared[0], stop)
    assert np.array_equal(draw(engine, PreparedLoras()).pixels, base.pixels)
