"""Which modules of a loaded model a LoRA may change."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from schemas.lora.shapes import ModelShapes

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


def model_shapes(model: Any) -> ModelShapes:
    """Describes a pipeline, or anything with a pipeline's three components; the meta device will do."""
    weights = {name: tuple(module.weight.shape) for name, module in lora_modules(model)}
    vectors = {name: len(parameter) for name, parameter in lora_parameters(model) if parameter.ndim == 1}
    return ModelShapes.of(weights, int(model.unet.config.cross_attention_dim), vectors)


def lora_modules(model: Any) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Every linear and convolution layer of the three components, by its name in `ModelShapes`."""
    for component in COMPONENTS:
        for path, module in getattr(model, component).named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                yield f"{component}.{path}", module


def lora_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every weight and bias that a LoRA may touch, as `unet.conv_in.weight`, in the model's own order.

    Those of linear, convolution and norm layers of the three components; no embeddings.
    """
    for component in COMPONENTS:
        for path, module in getattr(model, component).named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm | nn.GroupNorm):
                for part, parameter in module.named_parameters(recurse=False):
                    yield f"{component}.{path}.{part}", parameter
