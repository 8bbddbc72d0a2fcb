"""The names and shapes of an SDXL model's parameters, against the modules of diffusers and transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel

from consumer.engine.fast import layout
from consumer.engine.fast.configs import TextConfig, UNetConfig, VaeConfig
from tests import sdxl_base


def parameters(module: Any) -> list[layout.Parameter]:
    return [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()]


def written(module: Any) -> dict[str, Any]:
    """What a module's config.json says."""
    config = module.config if isinstance(module, PreTrainedModel) else module
    values: dict[str, Any] = json.loads(config.to_json_string())
    return values


@pytest.fixture(scope="module", params=["tiny", "base"])
def modules(request: pytest.FixtureRequest, tiny_model: Path) -> dict[str, Any]:
    """A model's modules on the meta device."""
    with torch.device("meta"):
        if request.param == "base":
            vae = AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
            )
            encoders = {"text_encoder": sdxl_base.text_encoder(), "text_encoder_2": sdxl_base.text_encoder_2()}
            return {"unet": sdxl_base.unet(), "vae": vae, **encoders}
        return {
            "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(tiny_model / "unet")),
            "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(tiny_model / "vae")),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(tiny_model / "text_encoder")),
            "text_encoder_2": CLIPTextModelWithProjection(
                CLIPTextConfig.from_pretrained(tiny_model / "text_encoder_2")
            ),
        }


def test_a_unets_parameters_come_in_the_modules_own_order(modules: dict[str, Any]) -> None:
    """Guards `layout.unet`."""
    assert list(layout.unet(UNetConfig.read(written(modules["unet"])))) == parameters(modules["unet"])


def test_a_decoders_parameters_come_in_the_modules_own_order(modules: dict[str, Any]) -> None:
    """Guards `layout.vae`."""
    theirs = [pair for pair in parameters(modules["vae"]) if pair[0].startswith(("decoder.", "post_quant_conv."))]
    assert list(layout.vae(VaeConfig.read(written(modules["vae"])))) == theirs


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_a_text_encoders_parameters_are_the_modules_own_with_q_k_and_v_side_by_side(
    modules: dict[str, Any], part: str
) -> None:
    """Guards `layout.text_encoder`."""
    values = {"architectures": None} | written(modules[part])
    ours = list(layout.text_encoder(TextConfig.read(part, values)))
    assert sorted(ours) == sorted(parameters(modules[part]))
    projections = [name.rsplit(".", 2)[1] for name, shape in ours if ".self_attn." in name and len(shape) == 2]
    layers = int(values["num_hidden_layers"])
    assert projections == ["q_proj", "k_proj", "v_proj", "out_proj"] * layers
