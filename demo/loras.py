"""LoRA files for the tiny model: the same deltas in each of the naming schemes that are in use.

`modules`: names to weight shapes, a part of `ModelShapes.weights`. `strength`: about how large a change is beside the
weight that it is added to. The same modules, rank, alpha, seed and strength give the same deltas in every writer.
"""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from consumer.lora.shapes import model_shapes
from schemas.lora.shapes import ModelShapes

Modules = Mapping[str, tuple[int, ...]]

_KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


def shapes_of(folder: Path) -> ModelShapes:
    """Describes the model in a diffusers folder from its configurations alone."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
        config_2 = CLIPTextConfig.from_pretrained(folder / "text_encoder_2")
        text_encoder_2 = CLIPTextModelWithProjection(config_2)
    return model_shapes(SimpleNamespace(unet=unet, text_encoder=text_encoder, text_encoder_2=text_encoder_2))


def attention_modules(shapes: ModelShapes, *, text_encoders: bool = False) -> dict[str, tuple[int, ...]]:
    """What LoRAs are usually trained on: the attention layers of the UNet, and on request of the text encoders."""
    return {
        name: shape
        for name, shape in shapes.weights.items()
        if ".attn" in name or (text_encoders and "self_attn" in name)
    }


def write_peft(path: Path, modules: Modules, *, rank: int = 4, alpha: float = 4.0, seed: int, strength: float) -> Path:
    """Writes `unet.<path>.lora_A.weight` and the like, as diffusers and PEFT do, with `<path>.alpha` beside them."""
    tensors = {}
    for name, (down, up) in deltas(modules, rank=rank, alpha=alpha, seed=seed, strength=strength).items():
        tensors[f"{name}.lora_A.weight"] = down
        tensors[f"{name}.lora_B.weight"] = up
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return _save(tensors, path)


def write_kohya(
    path: Path,
    modules: Modules,
    shapes: ModelShapes,
    *,
    rank: int = 4,
    alpha: float = 4.0,
    seed: int,
    strength: float,
    naming: Literal["diffusers", "sgm"] = "sgm",
) -> Path:
    """Writes `lora_unet_<path>.lora_down.weight` and the like, with the UNet's paths in either naming."""
    tensors = {}
    for name, (down, up) in deltas(modules, rank=rank, alpha=alpha, seed=seed, strength=strength).items():
        component, module = name.split(".", 1)
        if component == "unet" and naming == "sgm":
            module = shapes.sgm[name]
        elif component != "unet" and module != "text_projection":
            module = f"text_model.{module.removeprefix('text_model.')}"
        stem = _KOHYA_PREFIXES[component] + module.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = down
        tensors[f"{stem}.lora_up.weight"] = up
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return _save(tensors, path)


def write_sd15(path: Path) -> Path:
    """Writes a small LoRA for Stable Diffusion 1.5, whose prompts are 768 wide."""
    tensors = {}
    for block, width in ((1, 320), (4, 640), (7, 1280)):
        for layer, inputs in (("attn1_to_q", width), ("attn2_to_k", 768)):
            stem = f"lora_unet_input_blocks_{block}_1_transformer_blocks_0_{layer}"
            tensors[f"{stem}.lora_down.weight"] = torch.full((4, inputs), 0.01)
            tensors[f"{stem}.lora_up.weight"] = torch.full((width, 4), 0.01)
            tensors[f"{stem}.alpha"] = torch.tensor(4.0)
    return _save(tensors, path)


def deltas(
    modules: Modules, *, rank: int, alpha: float, seed: int, strength: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """Each module's down [rank, in, ...] and up [out, rank, ...], float32, drawn with a fixed seed."""
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = {}
    for name, (outputs, *inputs) in sorted(modules.items()):
        kernel = [1] * (len(inputs) - 1)
        fan_in = torch.Size(inputs).numel()
        down = torch.randn([rank, *inputs], generator=generator) / fan_in**0.5
        up = torch.randn([outputs, rank, *kernel], generator=generator) * (strength * rank**0.5 / alpha)
        drawn[name] = (down, up)
    return drawn


def _save(tensors: dict[str, Tensor], path: Path) -> Path:
    save_file(tensors, path)
    return path
