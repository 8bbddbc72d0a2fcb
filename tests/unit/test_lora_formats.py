"""Names, shapes and scaling: what becomes which delta, and what is refused and why."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from consumer.errors import LoraInvalid
from consumer.lora.deltas import LowRankDelta, ParsedLora
from consumer.lora.formats import parse
from demo import loras
from schemas.lora.adapter_config import METADATA_KEY
from schemas.lora.shapes import ModelShapes

TO_Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
TO_K2 = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
TO_OUT = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONV = "unet.down_blocks.1.resnets.0.conv1"
SHORTCUT = "unet.up_blocks.0.resnets.0.conv_shortcut"
TE1 = "text_encoder.encoder.layers.0.self_attn.q_proj"
TE2 = "text_encoder_2.text_model.encoder.layers.1.mlp.fc1"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lora.safetensors"


def halves(
    shapes: ModelShapes, module: str, rank: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    outputs, *inputs = shapes.weights[module]
    generator = torch.Generator().manual_seed(7)
    down = torch.randn([rank, *inputs], generator=generator).to(dtype)
    up = torch.randn([outputs, rank, *([1] * (len(inputs) - 1))], generator=generator).to(dtype)
    return down, up


def read(
    path: Path, shapes: ModelShapes, tensors: dict[str, Tensor], metadata: dict[str, Any] | None = None
) -> ParsedLora:
    packed = None if metadata is None else {METADATA_KEY: json.dumps(metadata)}
    save_file(tensors, path, metadata=packed)
    return parse(path, shapes)


def low_rank(parsed: ParsedLora) -> list[LowRankDelta]:
    assert all(isinstance(delta, LowRankDelta) for delta in parsed.deltas)
    return [delta for delta in parsed.deltas if isinstance(delta, LowRankDelta)]


def test_all_naming_schemes_give_the_same_deltas(tmp_path: Path, shapes: ModelShapes) -> None:
    settings: dict[str, Any] = {"rank": 3, "alpha": 1.5, "seed": 1, "strength": 0.5}
    files = [
        loras.write_peft(tmp_path / "peft", shapes.weights, **settings),
        loras.write_kohya(tmp_path / "sgm", shapes.weights, shapes, naming="sgm", **settings),
        loras.write_kohya(tmp_path / "diffusers", shapes.weights, shapes, naming="diffusers", **settings),
    ]
    drawn = loras.deltas(shapes.weights, **settings)
    for file in files:
        parsed = parse(file, shapes)
        assert parsed.skipped == ()
        assert {delta.module for delta in parsed.deltas} == set(shapes.weights)
        for delta in low_rank(parsed):
            down, up = drawn[delta.module]
            assert delta.factor == 0.5
            assert torch.equal(delta.down, down.flatten(1))
            assert torch.equal(delta.up, up.flatten(1))


@pytest.mark.parametrize(
    ("module", "down_name", "up_name"),
    [
        (TO_Q, "base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
        (TO_Q, "{}.lora_A.default.weight", "{}.lora_B.default.weight"),
        (TO_Q, "{}.lora.down.weight", "{}.lora.up.weight"),
        (TO_Q, "{bare}.lora_A.weight", "{bare}.lora_B.weight"),
        (TO_Q, "base_model.model.{bare}.lora_A.default_0.weight", "base_model.model.{bare}.lora_B.default_0.weight"),
        (TO_Q, "{attention}.processor.to_q_lora.down.weight", "{attention}.processor.to_q_lora.up.weight"),
        (TO_OUT, "{attention}.processor.to_out_lora.down.weight", "{attention}.processor.to_out_lora.up.weight"),
        (CONV, "{}.lora_A.weight", "{}.lora_B.weight"),
        (TE1, "text_encoder.text_model.{bare}.lora_A.weight", "text_encoder.text_model.{bare}.lora_B.weight"),
        (TE1, "{}.lora_linear_layer.down.weight", "{}.lora_linear_layer.up.weight"),
        (TE1, "text_encoder.text_model.{attention_bare}.to_q_lora.down.weight",
              "text_encoder.text_model.{attention_bare}.to_q_lora.up.weight"),
        (TE2, "text_encoder_2.encoder.layers.1.mlp.fc1.lora_A.weight",
              "text_encoder_2.encoder.layers.1.mlp.fc1.lora_B.weight"),
    ],
)  # fmt: skip
def test_older_and_wrapped_names_are_understood(
    path: Path, shapes: ModelShapes, module: str, down_name: str, up_name: str
) -> None:
    bare = module.split(".", 1)[1]
    attention = module.removesuffix(".0").rsplit(".", 1)[0]
    named = {"bare": bare, "attention": attention, "attention_bare": bare.rsplit(".", 1)[0]}
    down, up = halves(shapes, module)
    parsed = read(path, shapes, {down_name.format(module, **named): down, up_name.format(module, **named): up})
    (delta,) = low_rank(parsed)
    assert delta.module == module
    assert torch.equal(delta.down, down.flatten(1))
    assert delta.factor == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_three_storage_dtypes_are_kept(path: Path, shapes: ModelShapes, dtype: torch.dtype) -> None:
    down, up = halves(shapes, TO_Q, dtype=dtype)
    (delta,) = low_rank(read(path, shapes, {f"{TO_Q}.lora_A.weight": down, f"{TO_Q}.lora_B.weight": up}))
    assert delta.down.dtype == delta.up.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.int64])
def test_other_storage_dtypes_are_refused_by_name(path: Path, shapes: ModelShapes, dtype: torch.dtype) -> None:
    down, up = halves(shapes, TO_Q, dtype=dtype)
    with pytest.raises(LoraInvalid, match="F32, F16, BF16") as refusal:
        read(path, shapes, {f"{TO_Q}.lora_A.weight": down, f"{TO_Q}.lora_B.weight": up})
    assert refusal.value.details["dtype"] in {"F64", "I8", "I64"}


def test_convolutions_of_both_kernel_sizes_and_squeezed_linears_fit(path: Path, shapes: ModelShapes) -> None:
    tensors: dict[str, Tensor] = {}
    for module in (CONV, SHORTCUT):
        down, up = halves(shapes, module)
        tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    down, up = halves(shapes, TO_Q)
    tensors |= {f"{TO_Q}.lora_A.weight": down[:, :, None, None], f"{TO_Q}.lora_B.weight": up[:, :, None, None]}
    deltas = {delta.module: delta for delta in low_rank(read(path, shapes, tensors))}
    assert deltas[CONV].down.shape == (2, 32 * 9)
    assert deltas[SHORTCUT].up.shape == (64, 2)
    assert torch.equal(deltas[TO_Q].down, down)


def as_pair(shapes: ModelShapes, module: str = TO_Q, rank: int = 2) -> dict[str, Tensor]:
    down, up = halves(shapes, module, rank)
    return {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}


@pytest.mark.parametrize(
    ("metadata", "factor"),
    [
        ({"unet.r": 2, "unet.lora_alpha": 8}, 4.0),
        ({"r": 2, "lora_alpha": 8.0}, 4.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 1}}, 0.5),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {TO_Q.removeprefix("unet."): 1}}, 0.5),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {r"^down_blocks.1\.attentions.0.x": 1, "xattn1.to_q": 1}}, 4.0),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 8 / 2**0.5),
        ({"text_encoder.lora_alpha": 8}, 1.0),
        ({"unet.alpha_pattern": None, "unet.use_dora": False}, 1.0),
        ({}, 1.0),
    ],
)
def test_alpha_comes_from_the_adapters_own_configuration(
    path: Path, shapes: ModelShapes, metadata: dict[str, Any], factor: float
) -> None:
    (delta,) = low_rank(read(path, shapes, as_pair(shapes), metadata))
    assert delta.factor == pytest.approx(factor)


def test_an_alpha_tensor_counts_more_than_the_configuration(path: Path, shapes: ModelShapes) -> None:
    tensors = as_pair(shapes) | {f"{TO_Q}.alpha": torch.tensor(1.0)}
    (delta,) = low_rank(read(path, shapes, tensors, {"unet.lora_alpha": 8}))
    assert delta.factor == 0.5


@pytest.mark.parametrize(
    "metadata",
    [
        "not JSON",
        "[]",
        '{"unet.lora_alpha": "8"}',
        '{"unet.lora_alpha": true}',
        '{"unet.lora_alpha": NaN}',
        '{"unet.lora_alpha": 0}',
        '{"unet.lora_alpha": -1e400}',
        '{"unet.lora_alpha": 1' + "0" * 400 + "}",
        '{"unet.alpha_pattern": {"to_q": [1]}}',
        '{"unet.lora_alpha": 1, "unet.lora_alpha": 2}',
        '{"unet.alpha_pattern": [1]}',
        '{"unet.alpha_pattern": {"(a+)+$": 1}}',
        '{"unet.use_dora": true}',
    ],
)
def test_a_broken_configuration_is_refused(path: Path, shapes: ModelShapes, metadata: str) -> None:
    save_file(as_pair(shapes), path, metadata={METADATA_KEY: metadata})
    with pytest.raises(LoraInvalid):
        parse(path, shapes)


def test_what_diffusers_and_peft_write_is_read_with_their_scaling(
    tmp_path: Path, tiny_model: Path, shapes: ModelShapes
) -> None:
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    config = LoraConfig(
        r=4, lora_alpha=2, target_modules=["to_q", "conv1"], rank_pattern={"mid_block.resnets.0.conv1": 8}
    )
    unet.add_adapter(config)
    unet.save_lora_adapter(tmp_path / "bare")
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path / "prefixed",
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    modules = dict(unet.named_modules())
    for folder in ("bare", "prefixed"):
        parsed = parse(tmp_path / folder / "pytorch_lora_weights.safetensors", shapes)
        assert parsed.skipped == ()
        assert len(parsed.deltas) == len([name for name in modules if name.endswith("lora_A.default")])
        for delta in low_rank(parsed):
            assert delta.factor == modules[delta.module.removeprefix("unet.")].scaling["default"]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64, torch.float16])
def test_an_alpha_may_be_kept_as_any_kind_of_number(path: Path, shapes: ModelShapes, dtype: torch.dtype) -> None:
    (delta,) = low_rank(read(path, shapes, as_pair(shapes) | {f"{TO_Q}.alpha": torch.tensor(8, dtype=dtype)}))
    assert delta.alpha == 8.0


@pytest.mark.parametrize("alpha", [0.0, float("nan"), float("inf")])
def test_an_alpha_of_nothing_is_refused(path: Path, shapes: ModelShapes, alpha: float) -> None:
    with pytest.raises(LoraInvalid):
        read(path, shapes, as_pair(shapes) | {f"{TO_Q}.alpha": torch.tensor(alpha)})


def test_an_alpha_of_several_numbers_is_refused(path: Path, shapes: ModelShapes) -> None:
    with pytest.raises(LoraInvalid, match="not one number"):
        read(path, shapes, as_pair(shapes) | {f"{TO_Q}.alpha": torch.ones(2)})


def test_a_rank_of_4096_is_refused(path: Path, shapes: ModelShapes) -> None:
    with pytest.raises(LoraInvalid, match="rank is 4096"):
        read(path, shapes, as_pair(shapes, rank=4096))


def test_values_that_would_overflow_a_weight_are_refused(path: Path, shapes: ModelShapes) -> None:
    tensors = {name: tensor * 1e4 for name, tensor in as_pair(shapes).items()}
    with pytest.raises(LoraInvalid, match="too large"):
        read(path, shapes, tensors)


@pytest.mark.parametrize("missing", ["lora_A", "lora_B"])
def test_half_a_lora_is_refused(path: Path, shapes: ModelShapes, missing: str) -> None:
    tensors = as_pair(shapes) | as_pair(shapes, CONV)
    del tensors[f"{CONV}.{missing}.weight"]
    with pytest.raises(LoraInvalid, match="lacks its"):
        read(path, shapes, tensors)


def test_an_alpha_alone_is_refused(path: Path, shapes: ModelShapes) -> None:
    with pytest.raises(LoraInvalid, match="lacks its down and up part"):
        read(path, shapes, as_pair(shapes) | {f"{CONV}.alpha": torch.tensor(1.0)})


def test_halves_of_different_ranks_are_refused(path: Path, shapes: ModelShapes) -> None:
    with pytest.raises(LoraInvalid, match="do not fit each other"):
        read(path, shapes, as_pair(shapes) | {f"{TO_Q}.lora_A.weight": torch.ones(3, 32)})


def test_keys_of_modules_that_the_model_has_not_are_skipped_and_listed(path: Path, shapes: ModelShapes) -> None:
    stranger = {f"unet.extra.{half}.weight": torch.ones(2, 2) for half in ("lora_A", "lora_B")}
    parsed = read(path, shapes, as_pair(shapes) | stranger)
    assert [delta.module for delta in parsed.deltas] == [TO_Q]
    assert sorted(parsed.skipped) == sorted(stranger)


def test_a_lora_of_which_nothing_matches_is_refused(path: Path, shapes: ModelShapes) -> None:
    with pytest.raises(LoraInvalid, match="Nothing in the LoRA matches"):
        read(path, shapes, {f"unet.extra.{half}.weight": torch.ones(2, 2) for half in ("lora_A", "lora_B")})


def test_one_module_under_two_names_is_refused(path: Path, shapes: ModelShapes) -> None:
    bare = {name.removeprefix("unet."): tensor for name, tensor in as_pair(shapes).items()}
    with pytest.raises(LoraInvalid, match="two LoRAs for the module"):
        read(path, shapes, as_pair(shapes) | bare)


def test_one_half_under_two_names_is_refused(path: Path, shapes: ModelShapes) -> None:
    with pytest.raises(LoraInvalid, match="same part"):
        read(path, shapes, as_pair(shapes) | {f"{TO_Q}.lora.down.weight": torch.ones(2, 32)})


def test_a_lora_for_sd_15_is_refused_with_both_shapes(path: Path, shapes: ModelShapes) -> None:
    with pytest.raises(LoraInvalid, match=r"SD 1\.x") as refusal:
        parse(loras.write_sd15(path), shapes)
    details = refusal.value.details
    assert details["file_shape"] == [320, 768]
    assert details["model_shape"] == [32, 96]
    assert details["looks_like"] == "SD 1.x"
    assert "attn2_to_k" in str(details["module"])


@pytest.mark.parametrize("name", [TO_K2, "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"])
def test_a_lora_for_sd_2_is_refused_whether_its_module_exists_or_not(
    path: Path, shapes: ModelShapes, name: str
) -> None:
    kind = ("lora_A", "lora_B") if "." in name else ("lora_down", "lora_up")
    with pytest.raises(LoraInvalid) as refusal:
        read(
            path,
            shapes,
            {f"{name}.{kind[0]}.weight": torch.ones(4, 1024), f"{name}.{kind[1]}.weight": torch.ones(320, 4)},
        )
    assert refusal.value.details["looks_like"] == "SD 2.x"
    assert refusal.value.details["file_shape"] == [320, 1024]


def test_a_lora_of_another_size_is_refused_with_both_shapes(path: Path, shapes: ModelShapes) -> None:
    with pytest.raises(LoraInvalid, match="does not fit") as refusal:
        read(path, shapes, {f"{TO_Q}.lora_A.weight": torch.ones(2, 640), f"{TO_Q}.lora_B.weight": torch.ones(640, 2)})
    assert refusal.value.details == {"module": TO_Q, "file_shape": [640, 640], "model_shape": [32, 32]}


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        ("oft_blocks", "OFT"),
        ("boft_R", "OFT"),
        ("on_input", "(IA)^3"),
        ("vera_lambda_b", "VeRA"),
        ("a1.weight", "GLoRA"),
        ("glora_A.Xd", "GLoRA"),
        ("internal_xlora_classifier.weight", "X-LoRA"),
        ("lora_ups.0.weight", "HydraLoRA"),
        ("lora_E", "AdaLoRA"),
        ("lambda_layer", "T-LoRA"),
        ("fourierft_spectrum", "FourierFT"),
    ],
)
def test_adapters_of_other_kinds_are_refused_by_name(path: Path, shapes: ModelShapes, suffix: str, kind: str) -> None:
    with pytest.raises(LoraInvalid) as refusal:
        read(path, shapes, as_pair(shapes) | {f"{CONV}.{suffix}": torch.ones(1)})
    assert kind in str(refusal.value)
    assert refusal.value.details["tensor"] == f"{CONV}.{suffix}"


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "Flux"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "Flux"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", "SD 3"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "SD 3"),
        ("text_encoder_3.block.0.lora_A.weight", "SD 3"),
    ],
)
def test_loras_for_other_models_are_refused_as_what_they_are(
    path: Path, shapes: ModelShapes, name: str, model: str
) -> None:
    with pytest.raises(LoraInvalid, match=model):
        read(path, shapes, {name: torch.ones(1, 1)})


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.input_blocks.0.0.weight",
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
        "down_blocks.0.resnets.0.conv1.weight",
        "unet.conv_in.bias",
    ],
)
def test_a_full_checkpoint_is_refused_as_one(path: Path, shapes: ModelShapes, name: str) -> None:
    with pytest.raises(LoraInvalid, match="full checkpoint"):
        read(path, shapes, {name: torch.ones(1, dtype=torch.int64)})


def test_a_file_of_something_else_is_refused_with_examples(path: Path, shapes: ModelShapes) -> None:
    with pytest.raises(LoraInvalid, match="no LoRA tensors: emb_params"):
        read(path, shapes, {"emb_params": torch.ones(1, 768)})


def test_a_bias_that_the_model_has_not_is_skipped(path: Path, shapes: ModelShapes) -> None:
    parsed = read(path, shapes, as_pair(shapes) | {f"{TO_Q}.lora_B.bias": torch.ones(32)})
    assert parsed.skipped == (f"{TO_Q}.lora_B.bias",)
    assert parsed.modules == len(parsed.deltas) == 1
