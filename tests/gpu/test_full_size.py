"""The whole SDXL architecture with random weights, in float16 on a GPU: exact weights, exact base pictures."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline

from consumer.engine import LoraFile, PreparedLoras
from consumer.engine.stock import StockEngine
from consumer.errors import JobCancelled
from consumer.lora.shapes import model_shapes
from demo import loras
from schemas.requests import GenerationRequest, LoraRef
from tests import sdxl_base

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path) -> Iterator[Any]:
    tiny = StableDiffusionXLPipeline.from_pretrained(tiny_model)
    words = {"vocab_size": tiny.text_encoder.config.vocab_size, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    with torch.device("cuda"):
        unet, text_encoder = sdxl_base.unet(), sdxl_base.text_encoder(**words)
        text_encoder_2 = sdxl_base.text_encoder_2(**words)
        torch.set_default_dtype(torch.float32)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=1024,
            scaling_factor=0.13025,
            force_upcast=True,
        )
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        text_encoder_2=text_encoder_2.eval(),
        tokenizer=tiny.tokenizer,
        tokenizer_2=tiny.tokenizer_2,
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler.from_config(tiny.scheduler.config),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    yield pipeline
    torch.set_default_dtype(torch.float32)


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
