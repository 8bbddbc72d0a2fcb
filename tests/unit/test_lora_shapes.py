"""Module names of the real SDXL architecture, on the meta device."""

import re

import pytest

from schemas.lora.sdxl_base import sdxl_base as sdxl_base_table
from schemas.lora.shapes import ModelShapes
from tests import sdxl_base


@pytest.fixture(scope="module")
def sdxl() -> ModelShapes:
    return sdxl_base.shapes()


def unet_modules(shapes: ModelShapes) -> list[str]:
    return [name for name in shapes.weights if name.startswith("unet.")]


def test_all_722_transformer_linears_and_all_51_convolutions_are_there(sdxl: ModelShapes) -> None:
    unet = {name: sdxl.weights[name] for name in unet_modules(sdxl)}
    assert len([name for name, shape in unet.items() if "attentions" in name and len(shape) == 2]) == 722
    assert len([shape for shape in unet.values() if len(shape) == 4]) == 51
    assert len(unet) == 743 + 51
    assert sdxl.cross_attention_dim == 2048


def test_every_module_of_the_unet_has_four_names_of_its_own(sdxl: ModelShapes) -> None:
    for name in unet_modules(sdxl):
        path = name.removeprefix("unet.")
        for alias in (
            name,
            path,
            f"lora_unet_{path.replace('.', '_')}",
            f"lora_unet_{sdxl.sgm[name].replace('.', '_')}",
        ):
            assert sdxl.names[alias] == name, alias
    assert len(set(sdxl.sgm.values())) == len(sdxl.sgm) == 794 + 256  # layers and norms


@pytest.mark.parametrize(
    ("original", "module"),
    [
        ("input_blocks.0.0", "conv_in"),
        ("input_blocks.1.0.in_layers.2", "down_blocks.0.resnets.0.conv1"),
        ("input_blocks.2.0.emb_layers.1", "down_blocks.0.resnets.1.time_emb_proj"),
        ("input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks.4.0.skip_connection", "down_blocks.1.resnets.0.conv_shortcut"),
        ("input_blocks.5.1.proj_in", "down_blocks.1.attentions.1.proj_in"),
        ("input_blocks.6.0.op", "down_blocks.1.downsamplers.0.conv"),
        ("middle_block.0.out_layers.3", "mid_block.resnets.0.conv2"),
        ("middle_block.2.in_layers.2", "mid_block.resnets.1.conv1"),
        ("output_blocks.0.1.proj_out", "up_blocks.0.attentions.0.proj_out"),
        ("output_blocks.2.2.conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks.5.2.conv", "up_blocks.1.upsamplers.0.conv"),
        ("output_blocks.8.0.skip_connection", "up_blocks.2.resnets.2.conv_shortcut"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("label_emb.0.0", "add_embedding.linear_1"),
        ("out.2", "conv_out"),
    ],
)  # fmt: skip
def test_original_names_are_where_the_published_checkpoints_have_them(
    sdxl: ModelShapes, original: str, module: str
) -> None:
    assert sdxl.sgm[f"unet.{module}"] == original


@pytest.mark.parametrize(
    ("original", "module", "layer"),
    [
        ("input_blocks.4.1", "down_blocks.1.attentions.0", "transformer_blocks.0.attn1.to_q"),
        ("input_blocks.8.1", "down_blocks.2.attentions.1", "transformer_blocks.9.ff.net.0.proj"),
        ("middle_block.1", "mid_block.attentions.0", "transformer_blocks.9.attn2.to_out.0"),
        ("output_blocks.5.1", "up_blocks.1.attentions.2", "transformer_blocks.1.attn2.to_v"),
    ],
)
def test_inside_a_transformer_the_names_are_the_same(sdxl: ModelShapes, original: str, module: str, layer: str) -> None:
    assert sdxl.sgm[f"unet.{module}.{layer}"] == f"{original}.{layer}"


def test_the_original_names_cover_the_published_block_numbers(sdxl: ModelShapes) -> None:
    blocks = {match[0] for path in sdxl.sgm.values() if (match := re.match(r"\w+_blocks?\.\d+", path))}
    expected = {f"input_blocks.{i}" for i in range(9)} | {f"output_blocks.{i}" for i in range(9)}
    assert blocks == expected | {f"middle_block.{i}" for i in range(3)}


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
def test_text_encoders_are_named_with_and_without_text_model(sdxl: ModelShapes, component: str) -> None:
    path = "encoder.layers.3.self_attn.q_proj"
    aliases = [f"{component}.{path}", f"{component}.text_model.{path}"]
    prefixes = ("lora_te1_", "lora_te_") if component == "text_encoder" else ("lora_te2_",)
    aliases += [prefix + "text_model_encoder_layers_3_self_attn_q_proj" for prefix in prefixes]
    modules = {sdxl.names[alias] for alias in aliases}
    assert len(modules) == 1
    assert modules.pop() in {f"{component}.{path}", f"{component}.text_model.{path}"}


def test_both_text_encoders_are_whole(sdxl: ModelShapes) -> None:
    assert len([name for name in sdxl.weights if name.startswith("text_encoder.")]) == 12 * 6
    assert len([name for name in sdxl.weights if name.startswith("text_encoder_2.")]) == 32 * 6 + 1
    assert sdxl.names["lora_te2_text_projection"] == "text_encoder_2.text_projection"
    assert sdxl.weights["text_encoder_2.text_projection"] == (1280, 1280)


def test_the_table_that_is_looked_at_without_torch_is_the_architecture(sdxl: ModelShapes) -> None:
    def plain(shapes: ModelShapes) -> dict[str, tuple[int, ...]]:
        # transformers 5 has dropped this part of the first encoder's names
        return {name.replace(".text_model.", "."): shape for name, shape in shapes.weights.items()}

    assert plain(sdxl_base_table()) == plain(sdxl)
    assert sdxl_base_table().names.keys() == sdxl.names.keys()
    assert sdxl_base_table().cross_attention_dim == sdxl.cross_attention_dim
