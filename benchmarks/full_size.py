"""SDXL base 1.0's whole architecture with random weights: speed and memory do not depend on what a model has learned.

`python -m benchmarks.full_size FOLDER` writes it as a diffusers folder of 7 GB, named as on the hub.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline

from demo import tiny_sdxl
from tests import sdxl_base


def write(folder: Path, *, device: str = "cuda") -> Path:
    """Writes the model into `folder`, in float16 and under the names of the `fp16` variant. Drawn on `device`."""
    save(random_pipeline(device), folder)
    return folder


def save(pipeline: Any, folder: Path) -> None:
    """Writes a pipeline as a diffusers folder of the `fp16` variant, whatever dtype its parts have now."""
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder, safe_serialization=True, variant="fp16")


def random_pipeline(device: str) -> Any:
    """The pipeline on `device`, float16. Its tokenizers, and so the vocabulary, are the tiny model's."""
    with TemporaryDirectory() as temporary:
        tiny = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl.build(Path(temporary)))
    words = [
        {name: getattr(one.config, name) for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
        for one in (tiny.text_encoder, tiny.text_encoder_2)
    ]
    with drawing_on(device):
        text_encoder = sdxl_base.text_encoder(**words[0]).eval()
        text_encoder_2 = sdxl_base.text_encoder_2(**words[1]).eval()
        vae = random_vae()
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tiny.tokenizer,
        tokenizer_2=tiny.tokenizer_2,
        unet=random_unet(device),
        scheduler=tiny.scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def random_unet(device: str, dtype: torch.dtype = torch.float16) -> Any:
    """The UNet alone: 2.57 billion parameters."""
    with drawing_on(device, dtype):
        return sdxl_base.unet().eval()


def random_vae() -> Any:
    """The autoencoder, on the device and in the dtype that are set."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=1024,
        scaling_factor=0.13025,
        force_upcast=True,
    ).eval()


@contextmanager
def drawing_on(device: str, dtype: torch.dtype = torch.float16) -> Iterator[None]:
    """New modules are made on `device` in `dtype`, from one seed."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes SDXL base with random weights as a diffusers folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    began = time.perf_counter()
    write(arguments.folder, device=arguments.device)
    size_gb = sum(file.stat().st_size for file in arguments.folder.rglob("*") if file.is_file()) / 1e9
    print(
        json.dumps(
            {"folder": str(arguments.folder), "gb": round(size_gb, 2), "s": round(time.perf_counter() - began, 1)}
        )
    )


if __name__ == "__main__":
    main()
