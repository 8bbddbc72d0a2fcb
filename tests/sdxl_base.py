"""The architecture of SDXL base 1.0, whose weights no test needs.

`python -m tests.sdxl_base > schemas/lora/sdxl_base.json` writes down what `lora check` compares files with.
"""

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from consumer.lora.shapes import model_shapes
from schemas.lora.shapes import ModelShapes


def unet() -> Any:
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def text_encoder(**words: Any) -> Any:
    """CLIP ViT-L. `words`: what the tokenizer says of its vocabulary."""
    width: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768}
    return CLIPTextModel(CLIPTextConfig(**width, num_hidden_layers=12, num_attention_heads=12, **words))


def text_encoder_2(**words: Any) -> Any:
    """OpenCLIP bigG. `words`: what the tokenizer says of its vocabulary."""
    width: dict[str, Any] = {"hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280}
    config = CLIPTextConfig(**width, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu", **words)
    return CLIPTextModelWithProjection(config)


def shapes() -> ModelShapes:
    with torch.device("meta"):
        return model_shapes(SimpleNamespace(unet=unet(), text_encoder=text_encoder(), text_encoder_2=text_encoder_2()))


def table() -> str:
    """The modules' names and shapes as JSON, a module a line; then the vectors' names and lengths."""
    base = shapes()
    weights, vectors = (
        ",\n".join(f"{json.dumps(name)}: {json.dumps(shape)}" for name, shape in parameters.items())
        for parameters in (base.weights, base.vectors)
    )
    return (
        f'{{"cross_attention_dim": {base.cross_attention_dim}, "weights": {{\n{weights}\n}}, '
        f'"vectors": {{\n{vectors}\n}}}}\n'
    )


if __name__ == "__main__":
    sys.stdout.write(table())
