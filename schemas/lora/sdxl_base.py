"""What a LoRA may change in SDXL base 1.0, written down: no model and no torch is needed to ask."""

import json
from functools import cache
from importlib.resources import files

from schemas.lora.shapes import ModelShapes


@cache
def sdxl_base() -> ModelShapes:
    """Every linear, convolution and norm layer of the UNet and of both text encoders."""
    table = json.loads(files("schemas.lora").joinpath("sdxl_base.json").read_text("utf-8"))
    weights = {name: tuple(shape) for name, shape in table["weights"].items()}
    return ModelShapes.of(weights, table["cross_attention_dim"], table["vectors"])
