"""Which modules of a loaded model a LoRA may change."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from schemas.lora.shapes import ModelShapes

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


def model_shapes(model: Any) -> ModelShapes:
    """Describes a pipeline, or anything with a pipeline's three components; the meta device will do."""
    weights = {name: tuple(module.weight.shape) for name, module in lora_modules(model)}
    return ModelShapes.of(weights, int(model.unet.config.cross_attention_dim))


def lora_modules(model: Any) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Every linear and convolution layer of the three components, by its name in `ModelShapes`."""
    for component in COMPONENTS:
        for path, module in getattr(model, component).named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                yield f"{component}.{path}", module
