"""The model folder of the benchmarks: named as on the hub."""

from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from benchmarks import full_size
from benchmarks.flops import picture_tflop


def test_a_folder_has_the_names_and_the_dtype_of_the_hubs_fp16_variant(tiny_model: Path, tmp_path: Path) -> None:
    full_size.save(StableDiffusionXLPipeline.from_pretrained(tiny_model), tmp_path)
    weights = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.safetensors"))
    assert weights == [
        "text_encoder/model.fp16.safetensors",
        "text_encoder_2/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
    for file in weights:
        assert {tensor.dtype for tensor in load_file(tmp_path / file).values()} == {torch.float16}
    assert StableDiffusionXLPipeline.from_pretrained(tmp_path, variant="fp16").vae.config.force_upcast


def test_with_guidance_a_step_is_two_samples(tiny_model: Path) -> None:
    """Guards the factors of `picture_tflop`: 20 guided steps and 40 alone differ by the negative prompt's text."""
    guided, alone = (
        picture_tflop(tiny_model, width=512, height=512, steps=steps, cfg=cfg) for steps, cfg in ((20, 5.5), (40, 1.0))
    )
    assert 0 < guided - alone < 0.01 * guided
