"""How much arithmetic one picture is: counted on the meta device, so in a second and for any model and size."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

_TOKENS = 77
_FACTOR = 8


def picture_tflop(model: Path, *, width: int, height: int, steps: int, cfg: float) -> float:
    """TFLOP of matrix work for one picture of the diffusers folder `model`: text, denoising, decoding.

    What an implementation saves (upsampling folded into a convolution, keys and values computed once) is still counted:
    figures of different ones compare.
    """
    samples = 2 if cfg > 1.0 else 1
    with torch.device("meta"), torch.no_grad():
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(model / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(model / "vae"))
        first = CLIPTextModel(CLIPTextConfig.from_pretrained(model / "text_encoder"))
        second = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(model / "text_encoder_2"))
        latents = torch.empty(1, unet.config.in_channels, height // _FACTOR, width // _FACTOR)
        flop = samples * steps * _count(unet, latents, **_unet_inputs(unet, second.config.projection_dim))
        flop += samples * sum(_count(text, torch.zeros(1, _TOKENS, dtype=torch.long)) for text in (first, second))
        flop += _count(vae.decode, latents)
    return flop / 1e12


def _unet_inputs(unet: Any, pooled_width: int) -> dict[str, Any]:
    added = {"text_embeds": torch.empty(1, pooled_width), "time_ids": torch.empty(1, 6)}
    context = torch.empty(1, _TOKENS, unet.config.cross_attention_dim)
    return {"timestep": torch.tensor(500), "encoder_hidden_states": context, "added_cond_kwargs": added}


def _count(call: Any, *inputs: Any, **options: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        call(*inputs, **options)
    return int(counter.get_total_flops())
