"""The fast engine's networks, schedule and upsampling against diffusers' own modules."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional

from consumer.engine.fast.configs import SchedulerConfig, UNetConfig, VaeConfig
from consumer.engine.fast.decoder import Decoder
from consumer.engine.fast.ops import TorchOps
from consumer.engine.fast.schedule import euler_schedule
from consumer.engine.fast.unet import UNet
from consumer.engine.fast.upsampling import phase_weight
from consumer.lora.weights import PatchableWeights

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # diffusers' scheduler and numpy 2.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

TIMESTEPS = torch.tensor([901.0, 501.0, 1.0])
SIZES = torch.tensor([[128.0, 192.0, 0.0, 0.0, 128.0, 192.0]])


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def stock_unet(folder: Path, dtype: torch.dtype) -> Any:
    return UNet2DConditionModel.from_pretrained(folder / "unet", dtype=dtype)


def stock_vae(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoencoderKL.from_pretrained(folder / "vae", dtype=dtype)


def fast_unet(stock: Any) -> UNet:
    parameters = {f"unet.{name}": parameter for name, parameter in stock.named_parameters()}
    weights = PatchableWeights(parameters, channels_last=True)
    return UNet({name: weights[name] for name in parameters}, weights, UNetConfig.read(dict(stock.config)), TorchOps())


def fast_decoder(stock: Any, dtype: torch.dtype) -> Decoder:
    parameters = {f"vae.{name}": parameter for name, parameter in stock.named_parameters()}
    return Decoder(parameters, VaeConfig.read(dict(stock.config)), TorchOps(), dtype)


def predictions(folder: Path, dtype: torch.dtype, batch: int) -> tuple[Tensor, Tensor]:
    """What diffusers and the fast engine predict at three timesteps, both [3, batch, 4, 16, 24]."""
    stock = stock_unet(folder, dtype)
    unet = fast_unet(stock)
    config = unet.config
    prompts = torch.randn(batch, 77, config.text_width).to(dtype)
    pooled = torch.randn(batch, config.added_width - 6 * config.time_ids_width).to(dtype)
    sizes, latents = SIZES.expand(batch, -1), torch.randn(batch, 4, 16, 24).to(dtype)
    extra = {"text_embeds": pooled, "time_ids": sizes.to(dtype)}
    expected = [
        stock(latents, timestep, encoder_hidden_states=prompts, added_cond_kwargs=extra).sample
        for timestep in TIMESTEPS
    ]
    conditions = unet.conditions(len(TIMESTEPS), batch, 77)
    unet.condition(conditions, prompts, pooled, sizes, TIMESTEPS)
    inputs = latents.permute(0, 2, 3, 1).contiguous()
    actual = [unet.predict(inputs, conditions, torch.tensor([step])) for step in range(len(TIMESTEPS))]
    return torch.stack(expected), torch.stack(actual).permute(0, 1, 4, 2, 3)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_unet_predicts_what_diffusers_predicts(tiny_model: Path, batch: int) -> None:
    expected, actual = predictions(tiny_model, torch.float32, batch)
    assert expected.std() > 1
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_in_half_precision_the_unet_is_at_least_as_near_as_diffusers(tiny_model: Path) -> None:
    torch.manual_seed(1)
    exact, _ = predictions(tiny_model, torch.float32, 2)
    torch.manual_seed(1)
    stock, fast = predictions(tiny_model, torch.float16, 2)
    errors = [float((prediction.float() - exact).norm() / exact.norm()) for prediction in (stock, fast)]
    assert errors[1] < 1.05 * errors[0] < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_decoder_decodes_what_diffusers_decodes(tiny_model: Path, dtype: torch.dtype) -> None:
    stock = stock_vae(tiny_model)
    latents = torch.randn(1, 4, 16, 24)
    expected = stock.decode(latents / stock.config.scaling_factor).sample
    decoder = fast_decoder(stock, dtype)
    actual = decoder.decode(latents.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
    assert decoder.latent_shape(128, 192) == (16, 24, 4)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance)


def test_values_that_overflow_float16_are_decoded_in_float16(tiny_model: Path) -> None:
    """The reason for the divisor: the stock decoder in float16 draws NaN here."""
    stock = stock_vae(tiny_model)
    for name in ("conv_in", "mid_block.resnets.0.conv1", "mid_block.resnets.1.conv2", "up_blocks.1.resnets.0.conv2"):
        layer = stock.decoder.get_submodule(name)
        layer.weight *= 3e4
        layer.bias *= 3e4
    latents = torch.randn(1, 4, 16, 16)
    expected = stock.decode(latents / stock.config.scaling_factor).sample
    actual = fast_decoder(stock, torch.float16).decode(latents.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
    halved = stock_vae(tiny_model, torch.float16)
    halved.load_state_dict(stock.state_dict())
    assert not torch.isfinite(halved.decode((latents / stock.config.scaling_factor).half()).sample).all()
    torch.testing.assert_close(actual.float(), expected, rtol=0.02, atol=0.02)


def test_a_2x2_convolution_of_the_small_picture_is_upsampling_and_a_3x3_one() -> None:
    picture, weight, bias = torch.randn(2, 6, 5, 7), torch.randn(8, 6, 3, 3), torch.randn(8)
    expected = functional.conv2d(
        functional.interpolate(picture, scale_factor=2.0, mode="nearest"), weight, bias, padding=1
    )
    phases = functional.conv2d(picture, phase_weight(weight), padding=1).permute(0, 2, 3, 1).flatten(1, 2)
    actual = TorchOps().interleave(phases.contiguous(), 14, bias=bias)
    torch.testing.assert_close(actual.x.view(2, 10, 14, 8).permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("schedule", ["scaled_linear", "linear"])
def test_the_schedule_is_diffusers_own(spacing: str, schedule: str) -> None:
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": schedule, "timestep_spacing": spacing}
    config = SchedulerConfig.read({"steps_offset": 1, **settings})
    for steps in range(20, 51):
        stock = EulerDiscreteScheduler(steps_offset=1, **settings)
        stock.set_timesteps(steps)
        fast = euler_schedule(config, steps)
        assert np.array_equal(fast.timesteps, stock.timesteps.numpy())
        assert np.array_equal(fast.sigmas, stock.sigmas.numpy())
        assert fast.first_scale == pytest.approx(float(stock.init_noise_sigma), rel=1e-6)
