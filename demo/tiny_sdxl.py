"""A tiny model with SDXL's architecture, for tests and the demo: abstract pictures in a second or two on a CPU.

Every part is there and named as in SDXL (a UNet with three levels and added text and time conditions, two text
encoders, an autoencoder with factor 8), so that whatever handles SDXL handles this. Nothing is trained and nothing is
downloaded: the weights are drawn with fixed seeds, and some are set by hand so that pictures come out smooth:

* every 3x3 kernel is a random mixture of channels times a binomial blur;
* the UNet predicts its own normalised input as noise, through pairs of channels `+x` and `-x` (as
  `silu(x) - silu(-x) = x`), minus a smooth pattern that the noise, the prompt and the added conditions shape.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

_WORDS = """
a abstract above acrylic aerial an ancient and animal architecture art at autumn background beach beautiful
bird black blue blurry boat bright brown building by car castle cat cinematic city clouds cold color colorful dark day
deep desert detailed digital dog dragon drawing dream evening face fantasy field fire flower flowers focus fog forest
from garden girl glass gold golden grass gray green high highly horse hour house ice illustration in ink island lake
landscape large light lighting long low macro magic man mist moon morning mountain mountains night north of oil old on
orange over painting palace pattern person photo photograph photorealistic pink portrait quality rain realistic red
river robot rock rose sand sea sharp shore silver sky small smoke snow soft space spring stars stone street style
summer sun sunlight sunrise sunset the tower town tree trees under warm water watercolor wave white wide wild winter
with woman wood yellow young
"""

_LATENTS = 4
_SILU_PAIRS = 2 * _LATENTS
_NOISE_GAIN = 2.2
_CROSS_ATTENTION_GAIN = 5.0
_CONDITION_GAIN = 2.0
_COLOUR_GAIN = 0.9


def build(folder: Path) -> Path:
    """Writes the model into `folder` as a diffusers folder (safetensors, float32); the same bytes every time."""
    vocabulary, merges = _vocabulary()
    pipeline = StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_fill(CLIPTextModel(_text_config(32, vocabulary)), seed=21),
        text_encoder_2=_fill(CLIPTextModelWithProjection(_text_config(64, vocabulary)), seed=22),
        tokenizer=_tokenizer(vocabulary, merges, "<|endoftext|>"),
        tokenizer_2=_tokenizer(vocabulary, merges, "!"),
        unet=_unet(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            interpolation_type="linear",
            prediction_type="epsilon",
            steps_offset=1,
            timestep_spacing="leading",
            use_karras_sigmas=False,
        ),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    # Byte-level BPE: every byte alone and at a word's end, then merges that build each known word from the left.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    tokens = letters + [f"{letter}</w>" for letter in letters]
    merges: dict[tuple[str, str], None] = {}
    for word in _WORDS.split():
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges[parts[0], parts[1]] = None
            parts[:2] = [parts[0] + parts[1]]
    tokens += [left + right for left, right in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, list(merges)


def _tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]], padding: str) -> Any:
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77, pad_token=padding)


def _text_config(width: int, vocabulary: dict[str, int]) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=64,
        num_hidden_layers=2 if width == 32 else 3,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act="quick_gelu" if width == 32 else "gelu",
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"] if width == 32 else vocabulary["!"],
    )


def _unet() -> Any:
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 1, 2),
        norm_num_groups=8,
        cross_attention_dim=32 + 64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64 + 6 * 8,
    )
    _fill(unet, seed=23)
    with torch.no_grad():
        for name, module in unet.named_modules():
            if name.endswith("attn2.to_out.0"):
                module.weight *= _CROSS_ATTENTION_GAIN
            elif name.endswith("time_emb_proj"):
                module.weight *= _CONDITION_GAIN
        _predict_the_input(unet)
    return unet


def _predict_the_input(unet: Any) -> None:
    # conv_in's output reaches the last resnet as its skip connection, and conv_out through that one's shortcut.
    last = unet.up_blocks[-1].resnets[-1]
    width = unet.conv_in.out_channels
    unet.conv_in.weight[:_SILU_PAIRS] = 0
    last.conv_shortcut.weight[:_SILU_PAIRS] = 0
    for parameter in (last.conv_shortcut.bias, last.conv2.weight, last.conv2.bias, unet.conv_in.bias):
        parameter[:_SILU_PAIRS] = 0
    unet.conv_out.weight[:, :_SILU_PAIRS] = 0
    unet.conv_out.weight[:, _SILU_PAIRS:] *= -1
    for latent in range(_LATENTS):
        for index, sign in ((2 * latent, 1.0), (2 * latent + 1, -1.0)):
            unet.conv_in.weight[index, latent, 1, 1] = sign
            last.conv_shortcut.weight[index, width + index] = 1.0
            unet.conv_out.weight[latent, index, 1, 1] = sign * _NOISE_GAIN


def _vae() -> Any:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=_LATENTS,
        sample_size=1024,
        scaling_factor=0.13025,
        force_upcast=True,
    )
    _fill(vae, seed=36)
    with torch.no_grad():
        vae.decoder.conv_out.weight *= _COLOUR_GAIN
        vae.decoder.conv_out.bias.zero_()
    return vae


def _fill(model: Any, seed: int) -> Any:
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight.copy_(_kernel(module.weight.shape, generator))
                if module.bias is not None:
                    module.bias.copy_(0.1 * torch.randn(module.bias.shape, generator=generator))
            elif isinstance(module, nn.Embedding):
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator))
    return model.eval()


def _kernel(shape: torch.Size, generator: torch.Generator) -> Tensor:
    mixture: Tensor = torch.randn(shape[:2], generator=generator) / shape[1] ** 0.5
    if len(shape) == 2:
        return mixture
    taps = torch.tensor([1.0, 2.0, 1.0]) if shape[2] == 3 else torch.ones(shape[2])
    blur: Tensor = torch.outer(taps, taps)
    kernel: Tensor = mixture[:, :, None, None] * (blur / blur.sum())
    return kernel
