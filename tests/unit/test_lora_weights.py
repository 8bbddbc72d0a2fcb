"""Weights are exactly themselves again, whatever was patched in between."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from consumer.lora.deltas import Delta, ParsedLora
from consumer.lora.formats import parse
from consumer.lora.shapes import lora_modules
from consumer.lora.weights import PatchableWeights
from demo import loras
from schemas.lora.shapes import ModelShapes

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: dict[str, Any] = {"rank": 4, "alpha": 2.0, "strength": 1.0}


def load(folder: Path, dtype: torch.dtype) -> Any:
    return SimpleNamespace(
        unet=UNet2DConditionModel.from_pretrained(folder / "unet", dtype=dtype),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", dtype=dtype),
    )


@pytest.fixture
def half_model(tiny_model: Path) -> Any:
    return load(tiny_model, torch.float16)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, shapes: ModelShapes) -> list[ParsedLora]:
    """LoRAs of every kind: whole, attention only, with text encoders, a handful of modules."""
    folder = tmp_path_factory.mktemp("loras")
    partial = dict(random.Random(0).sample(sorted(shapes.weights.items()), 9))
    with_text = loras.attention_modules(shapes, text_encoders=True)
    files = [
        loras.write_peft(folder / "whole", shapes.weights, seed=1, **SETTINGS),
        loras.write_kohya(folder / "text", with_text, shapes, seed=2, naming="sgm", **SETTINGS),
        loras.write_kohya(
            folder / "unet", loras.attention_modules(shapes), shapes, seed=3, naming="diffusers", **SETTINGS
        ),
        loras.write_peft(folder / "partial", partial, seed=4, **SETTINGS),
    ]
    return [parse(file, shapes) for file in files]


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {
        f"{component}.{name}": tensor.clone()
        for component in ("unet", "text_encoder", "text_encoder_2")
        for name, tensor in getattr(model, component).state_dict().items()
    }


def differing(model: Any, before: dict[str, torch.Tensor]) -> int:
    return sum(int((tensor != before[name]).sum()) for name, tensor in snapshot(model).items())


def addresses(model: Any) -> dict[str, int]:
    return {name: module.weight.data_ptr() for name, module in lora_modules(model)}


def broken(lora: ParsedLora) -> ParsedLora:
    """The same LoRA, whose last delta fits no weight: patching it fails halfway."""
    last = lora.deltas[-1]
    return ParsedLora((*lora.deltas[:-1], Delta(last.module, torch.ones(1, 3), torch.ones(5, 1), 1.0)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_200_switches_leave_not_one_weight_changed(
    tiny_model: Path, pool: list[ParsedLora], dtype: torch.dtype
) -> None:
    model = load(tiny_model, dtype)
    before, places = snapshot(model), addresses(model)
    weights = PatchableWeights(model)
    chance = random.Random(5)
    for _ in range(200):
        chosen = chance.sample(pool, chance.randint(0, 3))
        if chosen and chance.random() < 0.15:
            chosen[-1] = broken(chosen[-1])
            with pytest.raises(RuntimeError):
                weights.patch([(lora.deltas, chance.random()) for lora in chosen])
        else:
            weights.patch([(lora.deltas, chance.choice([0.0, 0.3, 1.0])) for lora in chosen])
        if chance.random() < 0.1:
            weights.restore()
            assert weights.changed() == []
    weights.patch([(pool[0].deltas, 1.0)])
    assert weights.changed() != []
    weights.patch([])
    assert weights.changed() == []
    assert differing(model, before) == 0
    assert addresses(model) == places


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_weight_is_the_base_and_the_delta_rounded_once(
    tiny_model: Path, pool: list[ParsedLora], dtype: torch.dtype
) -> None:
    model = load(tiny_model, dtype)
    before = snapshot(model)
    PatchableWeights(model).patch([(pool[0].deltas, 0.7), (pool[1].deltas, 0.4)])
    live = {name: module.weight for name, module in lora_modules(model)}
    others = {delta.module: delta for delta in pool[1].deltas}
    for delta in pool[0].deltas:
        base = before[f"{delta.module}.weight"]
        change = 0.7 * 2.0 / 4 * (delta.up.double() @ delta.down.double())
        if other := others.get(delta.module):
            change += 0.4 * 2.0 / 4 * (other.up.double() @ other.down.double())
        expected = base.double() + change.view(base.shape)
        # half a unit in the last place from one rounding, and float32's own error where the sum cancels
        epsilon = torch.finfo(base.dtype).eps
        torch.testing.assert_close(live[delta.module].double(), expected, rtol=0.51 * epsilon + 2e-7, atol=4e-6)


def test_what_a_partial_lora_does_not_touch_is_pristine(half_model: Any, pool: list[ParsedLora]) -> None:
    weights = PatchableWeights(half_model)
    weights.patch([(pool[0].deltas, 1.0)])
    assert len(weights.changed()) == len(pool[0].deltas)
    weights.patch([(pool[3].deltas, 1.0)])
    assert set(weights.changed()) == {delta.module for delta in pool[3].deltas}


def test_a_scale_of_nothing_changes_nothing(half_model: Any, pool: list[ParsedLora]) -> None:
    weights = PatchableWeights(half_model)
    weights.patch([(pool[0].deltas, 0.0)])
    assert weights.changed() == []


def test_the_same_switch_gives_the_same_bits(half_model: Any, pool: list[ParsedLora]) -> None:
    weights = PatchableWeights(half_model)
    weights.patch([(pool[1].deltas, 0.5)])
    first = snapshot(half_model)
    weights.patch([(pool[0].deltas, 1.0), (pool[3].deltas, 1.0)])
    weights.patch([(pool[1].deltas, 0.5)])
    assert differing(half_model, first) == 0


@pytest.mark.parametrize("flipped", [-0.0, float("nan")])
def test_a_single_foreign_bit_is_seen(half_model: Any, flipped: float) -> None:
    with torch.no_grad():
        half_model.unet.conv_in.weight[0, 0, 0, 0] = 0.0
    weights = PatchableWeights(half_model)
    assert weights.changed() == []
    with torch.no_grad():
        half_model.unet.conv_in.weight[0, 0, 0, 0] = flipped
    assert weights.changed() == ["unet.conv_in"]


def test_fusing_and_unfusing_in_half_precision_would_not_have_been_exact(tiny_model: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet", dtype=torch.float16)
    before = {name: parameter.clone() for name, parameter in unet.named_parameters()}
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    unet.fuse_lora()
    unet.unfuse_lora()
    unet.unload_lora()
    changed = sum(int((parameter != before[name]).sum()) for name, parameter in unet.named_parameters())
    assert changed > 0


class HalfWritten:
    """A weight on a device that fails while it is written."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def copy_(self, source: torch.Tensor) -> None:
        self.weight[0].copy_(source[0])
        raise RuntimeError("the device failed")


def test_a_weight_that_was_half_written_is_restored(
    half_model: Any, pool: list[ParsedLora], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = PatchableWeights(half_model)
    module = pool[0].deltas[3].module
    with monkeypatch.context() as patched:
        patched.setitem(weights._live, module, HalfWritten(weights._live[module]))
        with pytest.raises(RuntimeError, match="device failed"):
            weights.patch([(pool[0].deltas, 1.0)])
    assert module in weights.changed()
    weights.patch([])
    assert weights.changed() == []
