"""What a header alone tells: every module of SDXL by every naming in every kind, and what does not fit."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import nn

from consumer.lora.shapes import lora_modules, lora_parameters
from schemas.lora.adapter_config import METADATA_KEY
from schemas.lora.errors import LoraUnusable
from schemas.lora.header import Header, TensorInfo
from schemas.lora.kinds import MAX_CORE_RANK, Kind
from schemas.lora.plan import LoraPlan, plan
from schemas.lora.sdxl_base import sdxl_base
from tests import sdxl_base as architecture

SDXL = sdxl_base()
TO_K = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
TO_Q = TO_K.replace("attn2.to_k", "attn1.to_q")
CONV = "unet.down_blocks.0.resnets.0.conv1"
WIDE_CONV = "unet.down_blocks.1.resnets.0.conv1"
Shape = tuple[int, ...]
Shapes = dict[str, Shape]


def planned(shapes: Shapes, *, dtype: str = "F16", metadata: dict[str, str] | None = None) -> LoraPlan:
    """The plan for a file of these tensors; nothing but the header is there."""
    tensors = {name: TensorInfo(dtype, shape, 0, 0) for name, shape in shapes.items()}
    return plan(Path("/dev/null"), Header(tensors, metadata or {}, 0), SDXL)


def named(module: str, parts: Shapes) -> Shapes:
    return {f"{module}.{part}": shape for part, shape in parts.items()}


@pytest.fixture(scope="module")
def model() -> Any:
    with torch.device("meta"):
        return SimpleNamespace(
            unet=architecture.unet(),
            text_encoder=architecture.text_encoder(),
            text_encoder_2=architecture.text_encoder_2(),
        )


@pytest.fixture(scope="module")
def sgm(model: Any) -> dict[str, str]:
    """Each parameter of the UNet by its path in the original code, from diffusers' own converter of checkpoints."""
    split = [name.rsplit(".", 1) for name in unet(model)]
    originals = [f"{SDXL.sgm[f'unet.{module}']}.{part}" for module, part in split]
    checkpoint = {f"model.diffusion_model.{original}": original for original in originals}
    converted = convert_ldm_unet_checkpoint(checkpoint, dict(model.unet.config))
    return {f"unet.{name}": original for name, original in converted.items()}


def unet(model: Any) -> list[str]:
    return [name for name, _ in model.unet.named_parameters()]


def test_the_original_names_are_those_of_diffusers_own_converter(model: Any, sgm: dict[str, str]) -> None:
    """Guards `_sgm_paths`, norms included: a name that is not the original one would not be converted back."""
    assert sgm.keys() == {f"unet.{name}" for name in unet(model)}
    for parameter, original in sgm.items():
        assert original.rsplit(".", 1)[0] == SDXL.sgm[parameter.rsplit(".", 1)[0]]


def undotted(prefix: str, path: str) -> str:
    return prefix + path.replace(".", "_")


def of_text_encoder(path: str) -> str:
    stem = path.removeprefix("text_model.")
    return stem if stem == "text_projection" else f"text_model.{stem}"


NAMINGS: dict[str, Callable[[str, str, str], str]] = {
    "diffusers": lambda component, path, sgm: f"{component}.{path}",
    "PEFT": lambda component, path, sgm: (
        f"base_model.model.{path}" if component == "unet" else f"{component}.{of_text_encoder(path)}"
    ),
    "kohya, diffusers": lambda component, path, sgm: {
        "unet": undotted("lora_unet_", path),
        "text_encoder": undotted("lora_te1_", of_text_encoder(path)),
        "text_encoder_2": undotted("lora_te2_", of_text_encoder(path)),
    }[component],
    "kohya, original": lambda component, path, sgm: {
        "unet": undotted("lora_unet_", sgm),
        "text_encoder": undotted("lora_te_", of_text_encoder(path)),
        "text_encoder_2": undotted("lora_te2_", of_text_encoder(path)),
    }[component],
    "LyCORIS": lambda component, path, sgm: (
        undotted("lycoris_", path) if component == "unet" else f"{component}.{path}"
    ),
    "ComfyUI": lambda component, path, sgm: {
        "unet": f"diffusion_model.{sgm}",
        "text_encoder": f"text_encoders.clip_l.transformer.{of_text_encoder(path)}",
        "text_encoder_2": f"text_encoders.clip_g.transformer.{of_text_encoder(path)}",
    }[component],
}


def lora(shape: Shape) -> Shapes:
    ones = (1,) * (len(shape) - 2)
    return {"lora_down.weight": (4, *shape[1:]), "lora_up.weight": (shape[0], 4, *ones)}


def peft(shape: Shape) -> Shapes:
    ones = (1,) * (len(shape) - 2)
    magnitude = (1, shape[0], 1, 1) if ones else (shape[0],)
    return {"lora_A.weight": (4, *shape[1:]), "lora_B.weight": (shape[0], 4, *ones), "lora_magnitude_vector": magnitude}


def columns(shape: Shape) -> Shapes:
    return lora(shape) | {"dora_scale": (1, shape[1], *(1,) * (len(shape) - 2))}


def flat(shape: Shape) -> int:
    return int(torch.Size(shape[1:]).numel())


def loha(shape: Shape) -> Shapes:
    parts: Shapes = {}
    for i in (1, 2):
        parts |= {f"hada_w{i}_a": (shape[0], 4), f"hada_w{i}_b": (4, flat(shape))}
    return parts


def cored(shape: Shape) -> Shapes:
    """LoHa where the kernel is larger than 1x1, as LyCORIS uses cores."""
    if len(shape) == 2 or shape[2] == 1:
        return loha(shape)
    parts: Shapes = {}
    for i in (1, 2):
        parts |= {f"hada_w{i}_a": (4, shape[0]), f"hada_w{i}_b": (4, shape[1]), f"hada_t{i}": (4, 4, *shape[2:])}
    return parts


def lokr(shape: Shape) -> Shapes:
    return {"lokr_w1": (4, 4), "lokr_w2_a": (shape[0] // 4, 8), "lokr_w2_b": (8, flat(shape) // 4)}


def whole_lokr(shape: Shape) -> Shapes:
    return {"lokr_w1": (4, 4), "lokr_w2": (shape[0] // 4, shape[1] // 4, *shape[2:]), "dora_scale": (shape[0], 1)}


def full(shape: Shape) -> Shapes:
    return {"diff": shape}


def modules(model: Any) -> Iterator[tuple[str, Shape]]:
    return ((name, tuple(module.weight.shape)) for name, module in lora_modules(model))


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("parts", [lora, peft, columns, loha, cored, lokr, whole_lokr, full])
def test_every_layer_of_sdxl_is_known_by_every_name_in_every_kind(
    model: Any, sgm: dict[str, str], naming: str, parts: Callable[[Shape], Shapes]
) -> None:
    """Guards `_aliases` and each of `kinds._MAKERS`: 722 linears of transformers, all else, both text encoders."""
    file: Shapes = {}
    for name, shape in modules(model):
        component, path = name.split(".", 1)
        original = sgm.get(f"{name}.weight", "").rsplit(".", 1)[0]
        file |= named(NAMINGS[naming](component, path, original), parts(shape))
    found = planned(file)
    assert found.skipped == ()
    changed = {delta.module.replace(".text_model.", ".") for delta in found.deltas}
    assert changed == {name.replace(".text_model.", ".") for name, _ in modules(model)}
    assert len(found.deltas) == 1059
    assert len([name for name in changed if "attentions" in name and name.startswith("unet.")]) == 722
    assert {delta.kind for delta in found.deltas} == {next(iter(found.deltas)).kind}


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_bias_and_norm_of_sdxl_is_known_by_every_name(model: Any, sgm: dict[str, str], naming: str) -> None:
    """Guards `ModelShapes.vectors` and the norms among the names; `lora_parameters` yields what can be planned."""
    file: Shapes = {}
    for name, parameter in lora_parameters(model):
        module, part = name.rsplit(".", 1)
        component, path = module.split(".", 1)
        alias = NAMINGS[naming](component, path, sgm.get(name, "").rsplit(".", 1)[0])
        file |= {f"{alias}.{'diff' if part == 'weight' else 'diff_b'}": tuple(parameter.shape)}
    found = planned(file)
    assert found.skipped == ()
    assert len(found.deltas) == 1059 + 1330
    assert {delta.kind for delta in found.deltas} == {Kind.FULL}


def test_the_parameters_are_all_but_the_embeddings_in_the_models_order(model: Any) -> None:
    """Guards `lora_parameters`, on which the weights' layout in memory rests."""
    expected = [
        f"{component}.{name}"
        for component in ("unet", "text_encoder", "text_encoder_2")
        for name, _ in getattr(model, component).named_parameters()
        if "embeddings." not in name
    ]
    assert [name for name, _ in lora_parameters(model)] == expected
    embeddings = [module for module in model.text_encoder.modules() if isinstance(module, nn.Embedding)]
    assert len(embeddings) == 2


MISFITS: dict[str, tuple[Shapes, str]] = {
    "a Kronecker product of terabytes": ({"lokr_w1": (10**6, 4), "lokr_w2": (10**6, 512)}, "does not fit the model"),
    "a Kronecker product a row too high": ({"lokr_w1": (1, 1), "lokr_w2": (641, 2048)}, "does not fit the model"),
    "a Kronecker product of three dimensions": ({"lokr_w1": (4, 4, 4), "lokr_w2": (160, 512)}, "do not fit each other"),
    "a Kronecker product twice as high": ({"lokr_w1": (4, 2), "lokr_w2": (320, 1024)}, "does not fit the model"),
    "a Kronecker factor in two forms": (
        {"lokr_w1": (4, 4), "lokr_w1_a": (4, 1), "lokr_w2": (160, 512)},
        "do not fit each other",
    ),
    "Kronecker factors of two ranks": (
        {"lokr_w1_a": (4, 1), "lokr_w1_b": (1, 4), "lokr_w2_a": (160, 2), "lokr_w2_b": (2, 512)},
        "do not fit each other",
    ),
    "half a Kronecker factor": ({"lokr_w1": (4, 4), "lokr_w2_a": (160, 2)}, "lacks its lokr_w2_b part"),
    "one Kronecker factor": ({"lokr_w2": (160, 512)}, "lacks its lokr_w1_a and lokr_w1_b part"),
    "a Hadamard product of two ranks": (
        loha((640, 2048)) | {"hada_w2_a": (640, 5), "hada_w2_b": (5, 2048)},
        "do not fit each other",
    ),
    "a Hadamard product of two sizes": (loha((640, 2048)) | {"hada_w2_b": (4, 2)}, "do not fit each other"),
    "a Hadamard product of a terabyte": (
        {"hada_w1_a": (10**9, 1), "hada_w1_b": (1, 2048), "hada_w2_a": (10**9, 1), "hada_w2_b": (1, 2048)},
        "does not fit the model",
    ),
    "one half of a Hadamard product": ({"hada_w1_a": (640, 4), "hada_w1_b": (4, 2048)}, "lacks its hada_w2_a and"),
    "one core of two": (loha((640, 2048)) | {"hada_t1": (4, 4, 3, 3)}, "lacks its hada_t2 part"),
    "a core of another rank": (lora((640, 2048)) | {"lora_mid.weight": (4, 5, 3, 3)}, "do not fit each other"),
    "a core alone": ({"lora_mid.weight": (4, 4, 3, 3)}, "lacks its up and down part"),
    "a rank of 2000": ({"lora_down.weight": (2000, 2048), "lora_up.weight": (640, 2000)}, "rank is 2000, more than"),
    "two kinds": (lora((640, 2048)) | full((640, 2048)), "two kinds of LoRA"),
    "a difference of another size": (full((640, 768)), "for SD 1.x"),
    "a difference that is too narrow": ({"diff": (2048,)}, "does not fit the model"),
    "a length alone": ({"dora_scale": (640, 1)}, "lacks its down and up part"),
    "a length beside a difference": (full((640, 2048)) | {"dora_scale": (640, 1)}, "lacks its down and up part"),
    "lengths twice": (peft((640, 2048)) | {"dora_scale": (640, 1)}, "two LoRAs for the module"),
    "lengths of something else": (lora((640, 2048)) | {"dora_scale": (2048, 1)}, "does not fit the model"),
    "PEFT's lengths by column": (lora((640, 2048)) | {"lora_magnitude_vector": (1, 2048)}, "does not fit the model"),
    "a bias beside DoRA": (peft((640, 2048)) | {"lora_B.bias": (640,)}, "has a bias beside DoRA"),
    "a bias of a LoRA alone": ({"lora_B.bias": (640,)}, "lacks its down and up part"),
}


@pytest.mark.parametrize(("parts", "said"), MISFITS.values(), ids=MISFITS.keys())
def test_what_does_not_fit_is_refused_by_its_header(parts: Shapes, said: str) -> None:
    """Guards each `raise` of `kinds` and of `_Planner`: no product is made before its shape is the weight's."""
    with pytest.raises(LoraUnusable) as refusal:
        planned(named(TO_K, parts))
    assert said in str(refusal.value)


def test_a_core_may_not_make_much_of_little() -> None:
    """Guards `MAX_CORE_RANK`: a core of rank r becomes r * inputs * kernel numbers."""
    rank = MAX_CORE_RANK + 1
    parts: Shapes = {"lora_down.weight": (rank, 320, 1, 1), "lora_up.weight": (320, rank, 1, 1)}
    with pytest.raises(LoraUnusable, match=f"rank is {rank}"):
        planned(named(CONV, parts | {"lora_mid.weight": (rank, rank, 3, 3)}))


def test_a_kernel_that_is_turned_around_does_not_fit() -> None:
    with pytest.raises(LoraUnusable, match="does not fit the model"):
        planned(named(CONV, {"lora_down.weight": (4, 3, 3, 320), "lora_up.weight": (320, 4)}))
    flattened = planned(named(CONV, {"lora_down.weight": (4, 2880), "lora_up.weight": (320, 4)}))
    assert [delta.rank for delta in flattened.deltas] == [4]


@pytest.mark.parametrize("parts", [loha, lokr, full, columns])
@pytest.mark.parametrize(("width", "model_name"), [(768, "SD 1.x"), (1024, "SD 2.x"), (1280, "SDXL refiner")])
def test_other_models_are_told_by_the_width_of_their_prompts_in_every_kind(
    parts: Callable[[Shape], Shapes], width: int, model_name: str
) -> None:
    """Guards `_refuse_other_prompt_width`, which looks at what a file's tensors make together."""
    alias = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k"
    with pytest.raises(LoraUnusable) as refusal:
        planned(named(alias, parts((320, width))))
    assert refusal.value.details["looks_like"] == model_name
    assert refusal.value.details["file_shape"] == [320, width]


@pytest.mark.parametrize("name", ["lora_unet_double_blocks_0_img_attn_proj", "transformer.transformer_blocks.0.attn.x"])
@pytest.mark.parametrize("parts", [loha, lokr, full])
def test_flux_and_sd_3_are_told_in_every_kind(parts: Callable[[Shape], Shapes], name: str) -> None:
    with pytest.raises(LoraUnusable, match=r"for (Flux|SD 3)"):
        planned(named(name, parts((64, 64))))


ATTN1 = named(TO_Q, lora((640, 640)))
TEXT = named("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", lora((768, 768)))
SAID_TO_BE_FOR = [
    ("sd_v1", "SD 1.x"),
    ("sd_1.5", "SD 1.x"),
    ("stable-diffusion-v1/lora", "SD 1.x"),
    ("sd_v2_v", "SD 2.x"),
    ("stable-diffusion-v2-768-v/lora", "SD 2.x"),
    ("stable-diffusion-xl-v1-refiner/lora", "SDXL refiner"),
    ("sd3", "SD 3"),
    ("stable-diffusion-3-medium/lora", "SD 3"),
    ("stable-diffusion-v3-medium/lora", "SD 3"),
    ("flux1", "Flux"),
    ("flux-1-dev/lora", "Flux"),
    ("Flux.1-dev/lora", "Flux"),
]


@pytest.mark.parametrize("field", ["ss_base_model_version", "modelspec.architecture"])
@pytest.mark.parametrize(("value", "name"), SAID_TO_BE_FOR, ids=[value for value, _ in SAID_TO_BE_FOR])
def test_a_file_that_says_that_it_is_for_another_model_is_refused_though_it_fits(
    field: str, value: str, name: str
) -> None:
    """Guards `refuse_other_bases`: SD 1.5's self-attention and CLIP-L have the shapes of SDXL's."""
    for tensors in (ATTN1, TEXT, ATTN1 | TEXT):
        with pytest.raises(LoraUnusable, match=f"for {name}, not for SDXL") as refusal:
            planned(tensors, metadata={field: value})
        assert refusal.value.details["looks_like"] == name


@pytest.mark.parametrize(
    "value",
    [
        "sdxl_base_v1-0",
        "sdxl_1.0",
        "sd_xl_base_1.0",
        "stable-diffusion-xl-v1-base/lora",
        "illustrious",
        "fluxion",
        "None",
        "",
    ],
)
def test_what_is_not_known_of_a_base_is_no_reason_to_refuse(value: str) -> None:
    for field in ("ss_base_model_version", "modelspec.architecture"):
        assert len(planned(ATTN1 | TEXT, metadata={field: value}).deltas) == 2


def test_prompts_as_wide_as_sdxls_count_for_more_than_what_a_file_says() -> None:
    """Guards the condition before `refuse_other_bases`: where kohya's merging is told no base it writes SD 1."""
    metadata = {"modelspec.architecture": "stable-diffusion-v1/lora"}
    assert len(planned(ATTN1 | named(TO_K, lora((640, 2048))), metadata=metadata).deltas) == 2


def test_a_pattern_is_a_modules_path_or_is_not_supported() -> None:
    """Guards `_by_path`: PEFT takes any regular expression, so the configuration is not broken."""
    for pattern in ("attn1.to_q", r"^down_blocks\.1.*", "to_q|to_k"):
        metadata = {METADATA_KEY: json.dumps({"rank_pattern": {pattern: 4}})}
        assert len(planned(ATTN1, metadata=metadata).deltas) == 1, "the tensors have their ranks"
    metadata = {METADATA_KEY: json.dumps({"alpha_pattern": {"to_q|to_k": 2}})}
    with pytest.raises(LoraUnusable, match=r"not supported.*alpha_pattern.*to_q\|to_k.*not a module's path") as refusal:
        planned(ATTN1, metadata=metadata)
    assert refusal.value.details == {"pattern": "to_q|to_k"}


def test_dora_by_the_configuration_needs_its_lengths() -> None:
    """Guards `uses_dora`: half a DoRA would be a LoRA that nobody trained."""
    metadata = {METADATA_KEY: '{"unet.use_dora": true, "unet.lora_alpha": 2}'}
    with pytest.raises(LoraUnusable, match="lacks its magnitude part"):
        planned(named(TO_Q, lora((640, 640))), metadata=metadata)
    (delta,) = planned(named(TO_Q, peft((640, 640))), metadata=metadata).deltas
    assert (delta.alpha, delta.magnitude_axis) == (2.0, 0)
    text = named("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", lora((768, 768)))
    assert len(planned(text, metadata=metadata).deltas) == 1


def test_lengths_of_a_square_weight_are_told_by_their_shape_and_name() -> None:
    """Guards `_axis` where outputs are as many as inputs."""
    for part, shape, axis in (
        ("dora_scale", (640, 1), 0),
        ("dora_scale", (1, 640), 1),
        ("dora_scale", (640,), 0),
        ("lora_magnitude_vector", (1, 640), 0),
        ("lora_magnitude_vector.weight", (640,), 0),
    ):
        (delta,) = planned(named(TO_Q, lora((640, 640)) | {part: shape})).deltas
        assert delta.magnitude_axis == axis, (part, shape)


@pytest.mark.parametrize("init", ["pissa_niter_16", "olora", "loftq", "corda", "lora_ga"])
def test_a_lora_that_was_taken_off_the_base_is_refused(init: str) -> None:
    """Guards `_refuse_other_bases`: PEFT changes the base's weights before it trains such a one."""
    file = named(TO_Q, peft((640, 640)))
    for field in ("init_lora_weights", "unet.init_lora_weights"):
        with pytest.raises(LoraUnusable, match=f"for another base.*{init}"):
            planned(file, metadata={METADATA_KEY: json.dumps({field: init})})
    for harmless in (True, "gaussian", "orthogonal", "eva"):
        planned(file, metadata={METADATA_KEY: json.dumps({"unet.init_lora_weights": harmless})})


@pytest.mark.parametrize(("convolution", "outputs"), [(CONV, 320), (WIDE_CONV, 640)], ids=["square", "wide"])
def test_pefts_lengths_under_lycoris_name_are_told_by_those_of_a_linear_layer(convolution: str, outputs: int) -> None:
    """Guards `_Planner._renamed`: a vector of a linear layer's lengths is PEFT's, so [1, n, 1, 1] is of the outputs."""
    _, inputs, *kernel = SDXL.weights[convolution]
    halves: Shapes = {"lora_down.weight": (4, inputs, *kernel), "lora_up.weight": (outputs, 4, 1, 1)}
    tensors = named(convolution, halves | {"dora_scale": (1, outputs, 1, 1)})
    linear = named(TO_K, lora((640, 2048)))
    renamed = planned(tensors | linear | {f"{TO_K}.dora_scale": (640,)})
    assert [delta.magnitude_axis for delta in renamed.deltas] == [0, 0]
    columns = {f"{TO_K}.dora_scale": (1, 2048), f"{convolution}.dora_scale": (1, inputs, 1, 1)}
    assert [delta.magnitude_axis for delta in planned(tensors | linear | columns).deltas] == [1, 1]


@pytest.mark.parametrize("shape", [(639,), (640, 1)], ids=["shorter", "of two dimensions"])
def test_a_bias_of_another_shape_does_not_fit(shape: Shape) -> None:
    """Guards `_Planner._bias`."""
    with pytest.raises(LoraUnusable, match="does not fit the model"):
        planned({f"{TO_Q.replace('to_q', 'to_out.0')}.diff_b": shape})


def test_what_the_model_has_not_is_skipped_in_every_kind() -> None:
    strange = named("unet.extra", {**loha((8, 8)), "diff_b": (8,)})
    found = planned(named(TO_Q, lora((640, 640))) | {f"{TO_Q}.diff_b": (640,)} | strange)
    assert sorted(found.skipped) == sorted([*strange, f"{TO_Q}.diff_b"])
    with pytest.raises(LoraUnusable, match="Nothing in the LoRA matches"):
        planned({f"{TO_Q}.diff_b": (640,)})
