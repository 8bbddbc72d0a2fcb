"""Every kind of LoRA, by every name it goes by, changes a weight as PEFT or the formula in float64 says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from consumer.errors import LoraInvalid
from consumer.lora.algebra import DoraDelta, FullDelta, HadamardDelta, KroneckerDelta
from consumer.lora.deltas import Delta, LowRankDelta, ParsedLora, with_tensors
from consumer.lora.formats import parse
from schemas.lora.sdxl_base import sdxl_base
from tests import lora_oracles
from tests.lora_oracles import ALPHA, RANK, Sample, by_peft

pytestmark = pytest.mark.usefixtures("one_thread")

SDXL = sdxl_base()
BLOCK = "unet.down_blocks.1.attentions.0.transformer_blocks.0"
TO_K = f"{BLOCK}.attn2.to_k"
TO_OUT = f"{BLOCK}.attn1.to_out.0"
TO_Q = f"{BLOCK}.attn1.to_q"
CONV = "unet.down_blocks.0.resnets.0.conv1"
SHORTCUT = "unet.down_blocks.1.resnets.0.conv_shortcut"
CONV_IN = "unet.conv_in"
CONV_NORM = "unet.conv_norm_out"
TE1 = next(name for name in SDXL.weights if name.endswith("layers.3.self_attn.q_proj"))
TE2 = "text_encoder_2.text_projection"
LAYERS = {"linear": TO_K, "3x3": CONV, "1x1": SHORTCUT, "narrow": CONV_IN, "text": TE1}
KOHYA = {
    TO_K: "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
    CONV: "lora_unet_input_blocks_1_0_in_layers_2",
    SHORTCUT: "lora_unet_down_blocks_1_resnets_0_conv_shortcut",
    CONV_IN: "lora_unet_input_blocks_0_0",
    TE1: "lora_te1_text_model_encoder_layers_3_self_attn_q_proj",
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lora.safetensors"


def read(path: Path, tensors: dict[str, Tensor]) -> ParsedLora:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return parse(path, SDXL)


def named(module: str, tensors: dict[str, Tensor], alpha: float | None = ALPHA) -> dict[str, Tensor]:
    """Tensors under a module's name, and its alpha."""
    found = {f"{module}.{name}": tensor for name, tensor in tensors.items()}
    return found if alpha is None else found | {f"{module}.alpha": torch.tensor(alpha)}


def assert_changes(delta: Delta, base: Tensor, expected: Tensor) -> None:
    """Within float32's rounding of what is expected, relative to the largest."""
    change = delta.change(base)
    assert (change.dtype, change.shape) == (torch.float32, base.shape)
    torch.testing.assert_close(change.double(), expected, rtol=1e-5, atol=2e-6 * float(expected.abs().max()))


def random(*shape: int, seed: int = 1) -> Tensor:
    return 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CASES = [
    pytest.param(kind, layer, id=f"{kind}, {layer}")
    for kind in lora_oracles.KINDS
    for layer in LAYERS
    if "core" not in kind or layer in ("3x3", "narrow")
]


@pytest.mark.parametrize(("kind", "layer"), CASES)
def test_a_weight_changes_as_peft_merges_it_whatever_the_names(path: Path, kind: str, layer: str) -> None:
    """Guards `change` of every delta and `formats._PRODUCTS`; PEFT's own layers are the oracle."""
    module = LAYERS[layer]
    sample = by_peft(SDXL.weights[module], lora_oracles.KINDS[kind]())
    bare = module.split(".", 1)[1]
    as_peft = f"base_model.model.{bare}" if module.startswith("unet.") else module
    for tensors in (
        named(module, sample.tensors),
        named(as_peft, sample.tensors),
        named(KOHYA[module], lora_oracles.in_kohyas_manner(sample)),
    ):
        parsed = read(path, tensors)
        (delta,) = parsed.deltas
        assert (delta.module, delta.part, parsed.skipped) == (module, "weight", ())
        assert_changes(delta, sample.base, sample.change)


@pytest.mark.parametrize("module", [TO_OUT, CONV])
def test_a_loras_bias_is_scaled_with_it(path: Path, module: str) -> None:
    """Guards `_Planner._bias`: alpha / rank counts for `lora_B.bias`, as where PEFT merges it."""
    sample = by_peft(SDXL.weights[module], lora_oracles.lora_with_bias())
    assert sample.base_bias is not None
    assert sample.bias_change is not None
    weight, bias = read(path, named(module, sample.tensors)).deltas
    assert (weight.part, bias.part, bias.module) == ("weight", "bias", module)
    assert_changes(weight, sample.base, sample.change)
    assert_changes(bias, sample.base_bias, sample.bias_change)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_with_a_core_is_the_chain_of_its_three_convolutions(path: Path, stride: int) -> None:
    """Guards `with_core`: what LyCORIS trains is down 1x1, mid 3x3, up 1x1, one after the other."""
    outputs, inputs = SDXL.weights[CONV][:2]
    down, mid, up = random(RANK, inputs, 1, 1), random(RANK, RANK, 3, 3, seed=2), random(outputs, RANK, 1, 1, seed=3)
    parts = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}
    (delta,) = read(path, named(KOHYA[CONV], parts)).deltas
    assert isinstance(delta, LowRankDelta)
    picture = random(1, inputs, 6, 6, seed=4)
    change = delta.change(torch.zeros(SDXL.weights[CONV]))
    chain = functional.conv2d(functional.conv2d(picture, down), mid, stride=stride, padding=1)
    expected = functional.conv2d(chain, up) * ALPHA / RANK
    torch.testing.assert_close(
        functional.conv2d(picture, change, stride=stride, padding=1), expected, rtol=1e-4, atol=1e-4
    )


def test_lycoris_sets_the_lengths_of_columns_in_its_older_files(path: Path) -> None:
    """Guards `_Planner._axis`: dora_scale [1, in, ...] is of the inputs, over outputs and kernel."""
    for module in (TO_K, CONV, TO_Q):
        shape = SDXL.weights[module]
        sample = by_peft(shape, lora_oracles.lora())
        lengths = 1 + random(1, shape[1], *[1] * (len(shape) - 2), seed=5).abs()
        changed = sample.base.double() + sample.change
        norms = changed.pow(2).sum(dim=[0, *range(2, changed.ndim)], keepdim=True).sqrt()
        (delta,) = read(path, named(module, sample.tensors | {"dora_scale": lengths})).deltas
        assert_changes(delta, sample.base, changed * (lengths.double() / norms) - sample.base.double())


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
@pytest.mark.parametrize("shape", [(-1, 1), (-1,)], ids=["column", "vector"])
def test_lycoris_sets_the_lengths_of_rows_of_other_kinds_too(path: Path, kind: str, shape: tuple[int, ...]) -> None:
    """Guards `_delta`: DoRA goes around any product."""
    sample = by_peft(SDXL.weights[TO_K], lora_oracles.KINDS[kind]())
    lengths = 1 + random(640, seed=5).abs()
    changed = sample.base.double() + sample.change
    expected = changed * (lengths.double() / changed.norm(dim=1)).unsqueeze(1) - sample.base.double()
    (delta,) = read(path, named(TO_K, sample.tensors | {"dora_scale": lengths.view(shape)})).deltas
    assert_changes(delta, sample.base, expected)


@pytest.mark.parametrize("suffix", ["", ".weight", ".default", ".default.weight"])
def test_pefts_magnitude_goes_by_four_names(path: Path, suffix: str) -> None:
    sample = by_peft(SDXL.weights[CONV], lora_oracles.lora(use_dora=True))
    tensors = dict(sample.tensors)
    tensors[f"lora_magnitude_vector{suffix}"] = tensors.pop("lora_magnitude_vector")
    (delta,) = read(path, named(CONV, tensors)).deltas
    assert isinstance(delta, DoraDelta)
    assert_changes(delta, sample.base, sample.change)


@pytest.mark.parametrize("layer", ["linear", "3x3", "narrow", "text"])
def test_a_dora_is_read_in_the_names_that_diffusers_converts_to(path: Path, layer: str) -> None:
    """Guards `_FLAT` of `keys`: the converter means kohya's names, and leaves a dot in those of the lengths."""
    module = LAYERS[layer]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["layer"], init_lora_weights=False, use_dora=True)
    sample = by_peft(SDXL.weights[module], config)
    tensors = convert_state_dict_to_kohya(named(module, sample.tensors, alpha=None))
    assert any(name.count(".") == 2 and name.endswith("lora_magnitude_vector") for name in tensors)
    (delta,) = read(path, tensors).deltas
    assert (delta.module, type(delta)) == (module, DoraDelta)
    assert_changes(delta, sample.base, sample.change)


def test_a_row_without_a_direction_stays_without_one() -> None:
    """Guards `clamp_min` in `DoraDelta.change`: PEFT would make it NaN."""
    inner = LowRankDelta("unet.conv_in", torch.zeros(1, 3), torch.zeros(2, 1), 1.0)
    base = torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0]])
    change = DoraDelta(inner, torch.tensor([7.0, 10.0]), 0).change(base)
    assert torch.equal(change, torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0]]))


def test_half_a_dora_is_half_way() -> None:
    """A DoRA's scale is applied to the way from the base, as ComfyUI does, not to what is in the length."""
    sample = by_peft((8, 6), lora_oracles.lora(use_dora=True))
    delta = DoraDelta(
        LowRankDelta("m", sample.tensors["lora_A.weight"], sample.tensors["lora_B.weight"], ALPHA),
        sample.tensors["lora_magnitude_vector"],
        0,
    )
    half = sample.base + 0.5 * delta.change(sample.base)
    torch.testing.assert_close(half.double(), sample.base.double() + 0.5 * sample.change)


@pytest.mark.parametrize("alpha", [None, 0.0, 9999.0])
def test_two_whole_factors_of_a_lokr_are_as_they_are(path: Path, alpha: float | None) -> None:
    """Guards `_lokr`: alpha scales what is decomposed; LyCORIS and ComfyUI leave whole factors alone."""
    left, right = random(16, 32), random(40, 64, seed=2)
    (delta,) = read(path, named(TO_K, {"lokr_w1": left, "lokr_w2": right}, alpha)).deltas
    assert_changes(delta, torch.zeros(640, 2048), torch.kron(left.double(), right.double()))


def test_a_lokr_of_a_convolution_keeps_the_kernel_in_its_right_factor(path: Path) -> None:
    """Guards `KroneckerDelta.change` for a right factor of four dimensions, and for a flattened product."""
    left, right = random(16, 8), random(20, 40, 3, 3, seed=2)
    expected = torch.kron(left.double()[:, :, None, None], right.double())
    (delta,) = read(path, named(CONV, {"lokr_w1": left, "lokr_w2": right}, None)).deltas
    assert_changes(delta, torch.zeros(320, 320, 3, 3), expected)
    down = torch.eye(360)
    parts = {"lokr_w1": left, "lokr_w2_a": right.flatten(1), "lokr_w2_b": down}
    (delta,) = read(path, named(CONV, parts, 360.0)).deltas
    assert_changes(delta, torch.zeros(320, 320, 3, 3), expected)


@pytest.mark.parametrize(
    ("module", "weight", "bias"),
    [(CONV, "diff", "diff_b"), (CONV_NORM, "w_norm", "b_norm"), (CONV_NORM, "diff", "diff_b"), (TE2, "diff", None)],
)
def test_differences_are_added_as_they_are(path: Path, module: str, weight: str, bias: str | None) -> None:
    """Guards `FullDelta`, and that no alpha scales it."""
    shape = SDXL.weights.get(module) or (SDXL.vectors[f"{module}.weight"],)
    parts = {weight: random(*shape)} | ({} if bias is None else {bias: random(shape[0], seed=2)})
    deltas = read(path, named(module, parts, 5.0)).deltas
    assert [delta.part for delta in deltas] == (["weight"] if bias is None else ["weight", "bias"])
    for delta, difference in zip(deltas, parts.values(), strict=True):
        assert isinstance(delta, FullDelta)
        assert_changes(delta, torch.ones_like(difference), difference.double())


def test_a_difference_of_a_bias_may_stand_beside_a_lora_or_alone(path: Path) -> None:
    sample = by_peft(SDXL.weights[TO_OUT], lora_oracles.lora())
    difference = random(640)
    for tensors in ({"diff_b": difference}, sample.tensors | {"diff_b": difference}):
        parsed = read(path, named(TO_OUT, tensors, None))
        assert parsed.modules == 1
        assert_changes(parsed.deltas[-1], torch.zeros(640), difference.double())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16])
def test_every_storage_is_read_exactly(path: Path, dtype: torch.dtype) -> None:
    """Guards the conversion in `FileTensors`: all 8-bit floats, subnormal ones too, are float16 numbers."""
    sample = by_peft(SDXL.weights[TO_K], lora_oracles.lora())
    tensors = {name: tensor.to(dtype) for name, tensor in sample.tensors.items()}
    down = tensors["lora_A.weight"]
    if dtype.itemsize == 1:
        every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
        down.view(-1)[:256] = torch.where(torch.isfinite(every), every, 0.0).to(dtype)
    (delta,) = read(path, named(TO_K, tensors, 0.5)).deltas
    assert isinstance(delta, LowRankDelta)
    assert delta.down.dtype == (torch.float16 if dtype.itemsize == 1 else dtype)
    assert torch.equal(delta.down.double(), down.double())
    expected = 0.5 / RANK * tensors["lora_B.weight"].double() @ down.double()
    assert_changes(delta, sample.base, expected)


def test_a_delta_moves_with_all_its_tensors(path: Path) -> None:
    """Guards `with_tensors`, which goes through deltas within deltas."""
    for kind in lora_oracles.KINDS:
        sample = by_peft(SDXL.weights[TO_K], lora_oracles.KINDS[kind]())
        (delta,) = read(path, named(TO_K, sample.tensors)).deltas
        moved = with_tensors(delta, lambda tensor: tensor.to("meta"))
        assert moved.change(torch.empty(640, 2048, device="meta")).device.type == "meta"
        with pytest.raises((RuntimeError, NotImplementedError)):
            moved.change(torch.zeros(640, 2048))


def too_large() -> dict[str, dict[str, Tensor]]:
    ones = {"w1_a": torch.ones(640, 1), "w1_b": torch.ones(1, 2048), "w2_a": torch.ones(640, 1)}
    return {
        "LoRA": {"lora_A.weight": torch.full((1, 2048), 300.0), "lora_B.weight": torch.full((640, 1), 300.0)},
        "LoHa": {f"hada_{name}": tensor for name, tensor in (ones | {"w2_b": torch.full((1, 2048), 7e4)}).items()},
        "LoKr": {"lokr_w1": torch.full((1, 2), 300.0), "lokr_w2": torch.full((640, 1024), 300.0)},
        "a difference": {"diff": torch.full((640, 2048), -7e4)},
        "DoRA": {"lora_A.weight": torch.ones(1, 2048), "lora_B.weight": torch.ones(640, 1),
                 "dora_scale": torch.full((640, 1), 7e4)},
        "what is small, on the way": {"lora_A.weight": torch.full((1, 2048), 1e-40),
                                      "lora_B.weight": torch.full((640, 1), 1e25), "alpha": torch.tensor(1e18)},
        "whose squares are 0": {"lora_A.weight": torch.full((2, 2048), 1e-23),
                                "lora_B.weight": torch.full((640, 2), 1e18), "alpha": torch.tensor(2e10)},
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "tensors"), too_large().items(), ids=too_large().keys())
def test_values_that_would_overflow_are_refused_in_every_kind(
    path: Path, kind: str, tensors: dict[str, Tensor]
) -> None:
    """Guards each case of `bounds._bounds`, `is_small`, and float64 in `longest`."""
    with pytest.raises(LoraInvalid, match="too large"):
        read(path, named(TO_K, tensors, None))


def test_values_in_a_core_that_would_overflow_are_refused(path: Path) -> None:
    """Guards `has_core`: what a core makes of small numbers may be large."""
    parts = {
        "lora_down.weight": torch.full((RANK, 320, 1, 1), 100.0),
        "lora_mid.weight": torch.full((RANK, RANK, 3, 3), 100.0),
        "lora_up.weight": torch.full((320, RANK, 1, 1), 100.0),
    }
    with pytest.raises(LoraInvalid, match="too large"):
        read(path, named(CONV, parts, None))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16])
@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"])
def test_nan_is_refused_wherever_it_is(path: Path, dtype: torch.dtype, part: str) -> None:
    tensors = dict(by_peft(SDXL.weights[TO_K], lora_oracles.lora(use_dora=True)).tensors)
    tensors[part].view(-1)[7] = float("nan")
    tensors[part] = tensors[part].to(dtype)
    with pytest.raises(LoraInvalid, match="NaN or Inf") as refusal:
        read(path, named(TO_K, tensors))
    assert refusal.value.details == {"tensor": f"{TO_K}.{part}"}


def test_the_kinds_are_what_they_are_called(path: Path) -> None:
    classes: dict[str, Any] = {"LoRA": LowRankDelta, "LoHa": HadamardDelta, "LoKr": KroneckerDelta, "DoRA": DoraDelta}
    for kind, expected in classes.items():
        sample: Sample = by_peft(SDXL.weights[TO_K], lora_oracles.KINDS[kind]())
        (delta,) = read(path, named(TO_K, sample.tensors)).deltas
        assert type(delta) is expected
