"""Weights are exactly themselves again, whatever was patched in between."""

import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from consumer.engine.stock import adopt
from consumer.errors import ModelBroken, WeightsChanged
from consumer.lora.deltas import Delta, LowRankDelta, ParsedLora
from consumer.lora.low_rank import PackedDeltas
from consumer.lora.shapes import lora_parameters
from consumer.lora.stacks import Stack
from consumer.lora.weights import PatchableWeights
from demo import loras
from schemas.lora.shapes import ModelShapes

pytestmark = pytest.mark.usefixtures("one_thread")


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
def pool(shapes: ModelShapes) -> list[ParsedLora]:
    """LoRAs of every extent: whole, attention with text encoders, attention only, a handful of modules."""
    modules: list[loras.Modules] = [
        shapes.weights,
        loras.attention_modules(shapes, text_encoders=True),
        loras.attention_modules(shapes),
        dict(random.Random(0).sample(sorted(shapes.weights.items()), 9)),
    ]
    return [low_rank(part, seed) for seed, part in enumerate(modules)]


def low_rank(modules: loras.Modules, seed: int) -> ParsedLora:
    drawn = loras.deltas(modules, rank=4, alpha=2.0, strength=1.0, seed=seed)
    deltas = (LowRankDelta(name, down.flatten(1), up.flatten(1), 2.0) for name, (down, up) in drawn.items())
    return ParsedLora(tuple(deltas))


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {
        f"{component}.{name}": tensor.clone()
        for component in ("unet", "text_encoder", "text_encoder_2")
        for name, tensor in getattr(model, component).state_dict().items()
    }


def differing(model: Any, before: dict[str, torch.Tensor]) -> int:
    return sum(int((tensor != before[name]).sum()) for name, tensor in snapshot(model).items())


def addresses(model: Any) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in lora_parameters(model)}


@dataclass(frozen=True)
class FullDelta:
    """A difference as it is, of a weight or of a bias."""

    module: str
    part: str
    difference: torch.Tensor

    def change(self, base: torch.Tensor) -> torch.Tensor:
        assert base.dtype == torch.float32
        assert base.is_contiguous()
        return self.difference.float().view(base.shape)


@dataclass(frozen=True)
class Failing:
    """A delta that cannot be computed: patching it fails halfway."""

    module: str
    part: str = "bias"

    def change(self, base: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the device failed")


def full(names: list[str], model: Any, seed: int) -> ParsedLora:
    """Full differences of the named parameters."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: parameter.shape for name, parameter in lora_parameters(model)}
    deltas = []
    for name in names:
        module, part = name.rsplit(".", 1)
        deltas.append(FullDelta(module, part, torch.randn(shapes[name], generator=generator) * 0.1))
    return ParsedLora(tuple(deltas))


def broken(lora: ParsedLora) -> ParsedLora:
    return ParsedLora((*lora.deltas, Failing("unet.conv_out")))


def patch(weights: PatchableWeights, *loras: tuple[ParsedLora, float]) -> None:
    weights.patch(weights.prepare([(lora.deltas, scale) for lora, scale in loras]))


def parameters_of(lora: ParsedLora) -> set[str]:
    return {f"{delta.module}.{delta.part}" for delta in lora.deltas}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
def test_100_switches_leave_not_one_weight_changed(
    tiny_model: Path, pool: list[ParsedLora], dtype: torch.dtype
) -> None:
    """Guards `_copy_back`, and that `patch` marks what it is about to write."""
    model = load(tiny_model, dtype)
    before = snapshot(model)
    weights = adopt(model)
    places = addresses(model)
    norms_and_biases = [name for name, parameter in lora_parameters(model) if parameter.dim() == 1]
    kinds = [*pool, full(norms_and_biases, model, seed=6), full(["unet.conv_in.weight"], model, seed=7)]
    chance = random.Random(5)
    for _ in range(100):
        chosen = chance.sample(kinds, chance.randint(0, 3))
        if chosen and chance.random() < 0.15:
            with pytest.raises(RuntimeError, match="device failed"):
                patch(weights, *((broken(lora), chance.random()) for lora in chosen))
        else:
            patch(weights, *((lora, chance.choice([0.0, 0.3, 1.0])) for lora in chosen))
        if chance.random() < 0.1:
            weights.restore()
            assert weights.changed() == []
        assert int(weights.sample()) == 0
    patch(weights, (pool[0], 1.0), (kinds[-2], 1.0))
    assert set(weights.changed()) == parameters_of(pool[0]) | parameters_of(kinds[-2])
    patch(weights)
    assert weights.changed() == []
    assert differing(model, before) == 0
    assert addresses(model) == places


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["float16", "bfloat16", "float32"]
)
def test_a_weight_is_the_base_and_the_deltas_rounded_once(
    tiny_model: Path, pool: list[ParsedLora], dtype: torch.dtype, channels_last: bool
) -> None:
    """Guards `patch_rows_by_torch`, `_fill` and its order of a convolution's inputs, and `_change`."""
    model = load(tiny_model, dtype)
    before = snapshot(model)
    weights = PatchableWeights(dict(lora_parameters(model)), channels_last=channels_last)
    chosen = [(pool[0], 0.7), (pool[1], 0.4), (full(["unet.conv_in.weight", "unet.conv_in.bias"], model, seed=8), 0.5)]
    patch(weights, *chosen)
    expected = {name: before[name].double() for lora, _ in chosen for name in parameters_of(lora)}
    for lora, scale in chosen:
        for delta in lora.deltas:
            name = f"{delta.module}.{delta.part}"
            expected[name] = expected[name] + scale * by_hand(delta).view(before[name].shape)
    for name, weight in expected.items():
        # half a unit in the last place from one rounding, and float32's own error where the sum cancels
        epsilon = torch.finfo(dtype).eps
        torch.testing.assert_close(weights[name].double(), weight, rtol=0.51 * epsilon + 2e-7, atol=4e-6)


def by_hand(delta: Delta) -> torch.Tensor:
    if isinstance(delta, LowRankDelta):
        return delta.alpha / len(delta.down) * (delta.up.double() @ delta.down.double())
    assert isinstance(delta, FullDelta)
    return delta.difference.double()


def test_what_a_partial_lora_does_not_touch_is_pristine(half_model: Any, pool: list[ParsedLora]) -> None:
    weights = adopt(half_model)
    patch(weights, (pool[0], 1.0))
    assert len(weights.changed()) == len(pool[0].deltas)
    patch(weights, (pool[3], 1.0))
    assert set(weights.changed()) == parameters_of(pool[3])


def test_a_scale_of_nothing_changes_nothing(half_model: Any, pool: list[ParsedLora]) -> None:
    """Not by adding zeros, which would make -0.0 to 0.0. Guards `prepare`."""
    with torch.no_grad():
        half_model.unet.conv_in.weight.fill_(-0.0)
    weights = adopt(half_model)
    patch(weights, (pool[0], 0.0))
    assert weights.changed() == []
    assert weights.touched == set()


def test_a_parameter_that_is_not_patched_any_more_is_copied_back_and_not_computed(half_model: Any) -> None:
    """Guards `_copy_back`: -0.0 + 0.0 is 0.0."""
    with torch.no_grad():
        half_model.unet.conv_in.weight.fill_(-0.0)
    weights = adopt(half_model)
    patch(weights, (full(["unet.conv_in.weight"], half_model, seed=1), 1.0))
    patch(weights, (full(["unet.conv_out.weight"], half_model, seed=1), 1.0))
    assert weights.changed() == ["unet.conv_out.weight"]


def test_the_same_switch_gives_the_same_bits(half_model: Any, pool: list[ParsedLora]) -> None:
    weights = adopt(half_model)
    patch(weights, (pool[1], 0.5))
    first = snapshot(half_model)
    patch(weights, (pool[0], 1.0), (pool[3], 1.0))
    patch(weights, (pool[1], 0.5))
    assert differing(half_model, first) == 0


def test_a_prepared_patch_serves_again_and_preparing_another_touches_nothing(
    half_model: Any, pool: list[ParsedLora]
) -> None:
    weights = adopt(half_model)
    first = weights.prepare([(pool[0].deltas, 1.0)])
    weights.patch(first)
    patched = snapshot(half_model)
    second = weights.prepare([(pool[2].deltas, 1.0), (pool[3].deltas, 0.5)])
    assert differing(half_model, patched) == 0
    weights.patch(second)
    weights.patch(first)
    assert differing(half_model, patched) == 0


@pytest.mark.parametrize("flipped", [-0.0, float("nan")])
def test_a_single_foreign_bit_is_seen(half_model: Any, flipped: float) -> None:
    with torch.no_grad():
        half_model.unet.conv_in.weight[0, 0, 0, 0] = 0.0
    weights = adopt(half_model)
    assert weights.changed() == []
    with torch.no_grad():
        half_model.unet.conv_in.weight[0, 0, 0, 0] = flipped
    assert weights.changed() == ["unet.conv_in.weight"]


def test_fusing_and_unfusing_in_half_precision_would_not_have_been_exact(tiny_model: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet", dtype=torch.float16)
    before = {name: parameter.clone() for name, parameter in unet.named_parameters()}
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    unet.fuse_lora()
    unet.unfuse_lora()
    unet.unload_lora()
    changed = sum(int((parameter != before[name]).sum()) for name, parameter in unet.named_parameters())
    assert changed > 0


def test_a_weight_that_was_half_written_is_restored(
    half_model: Any, pool: list[ParsedLora], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the order in `patch`: a place is marked before it is written."""
    weights = adopt(half_model)

    def half(stack: Stack, packed: PackedDeltas) -> None:
        stack.live[int(packed.rows[0])].view(-1)[0] += 1
        raise RuntimeError("the device failed")

    with monkeypatch.context() as patched:
        patched.setattr(weights, "_patch_rows", half)
        with pytest.raises(RuntimeError, match="device failed"):
            patch(weights, (pool[0], 1.0))
    assert len(weights.changed()) == 1
    patch(weights)
    assert weights.changed() == []


def test_a_lora_of_a_parameter_that_is_not_there_is_refused_when_prepared(half_model: Any) -> None:
    weights = adopt(half_model)
    with pytest.raises(KeyError):
        weights.prepare([((Failing("unet.no_such"),), 1.0)])


def test_a_hundred_samples_see_a_single_foreign_bit_wherever_it_is(half_model: Any, pool: list[ParsedLora]) -> None:
    """Guards `_next_places`, `Stack.differing` and that `check` copies everything back."""
    weights = adopt(half_model)
    patch(weights, (pool[3], 1.0))
    unpatched = sorted(set(dict(lora_parameters(half_model))) - parameters_of(pool[3]))
    for name in random.Random(1).sample(unpatched, 8):
        weights[name].view(torch.int16).view(-1)[-1] ^= 1
        samples = (weights.sample() for _ in range(100))
        seen = next(sample for sample in samples if int(sample))
        with pytest.raises(WeightsChanged, match="1 of the model's parameters had changed"):
            weights.check(seen)
        assert weights.changed() == []
        assert name in weights.touched


def test_a_sample_of_what_is_patched_on_purpose_is_sound(half_model: Any, pool: list[ParsedLora]) -> None:
    weights = adopt(half_model)
    patch(weights, (pool[0], 1.0))
    for _ in range(100):
        weights.check(weights.sample())
    assert weights.changed() != []


@pytest.mark.parametrize("patched", [False, True], ids=["bare", "patched"])
def test_a_pristine_copy_that_changed_in_memory_is_a_broken_model(
    half_model: Any, pool: list[ParsedLora], patched: bool
) -> None:
    """Guards `Stack.rotted`; where a LoRA is patched in, the live weight says nothing."""
    weights = adopt(half_model)
    if patched:
        patch(weights, (pool[0], 1.0))
    stack, row = weights._places["unet.conv_in.weight"]
    weights._stacks[stack].pristine[row].view(-1).view(torch.int16)[7] ^= 1 << 14
    sample = next(sample for sample in (weights.sample() for _ in range(100)) if int(sample))
    with pytest.raises(ModelBroken, match="1 of the model's pristine"):
        weights.check(sample)


def test_what_was_touched_is_told_until_it_is_settled_whatever_fails(half_model: Any, pool: list[ParsedLora]) -> None:
    """Guards `_written`: what is derived from a weight must be made anew after it is copied back, too."""
    weights = adopt(half_model)
    patch(weights, (pool[3], 1.0))
    assert weights.touched == parameters_of(pool[3])
    weights.settle()
    assert weights.touched == set()
    with pytest.raises(RuntimeError, match="device failed"):
        patch(weights, (broken(pool[2]), 1.0))
    weights.restore()
    assert weights.touched == parameters_of(pool[3]) | parameters_of(broken(pool[2]))
