"""Exact weights on a GPU, with every parameter of SDXL's architecture in float16: values are random."""

import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from consumer.errors import WeightsChanged
from consumer.lora.deltas import Delta, LowRankDelta
from consumer.lora.low_rank import patch_rows_by_torch
from consumer.lora.shapes import lora_parameters
from consumer.lora.weights import PatchableWeights
from tests import sdxl_base

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# one of each shape that matters to the kernel, and the narrow ones
LOOKED_AT = (
    "unet.conv_in.weight",
    "unet.conv_out.weight",
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight",
    "unet.mid_block.attentions.0.transformer_blocks.3.attn2.to_v.weight",
    "unet.mid_block.attentions.0.transformer_blocks.3.ff.net.0.proj.weight",
    "unet.up_blocks.0.resnets.0.conv1.weight",
    "unet.up_blocks.0.resnets.0.conv_shortcut.weight",
    "text_encoder.encoder.layers.3.mlp.fc2.weight",
    "text_encoder_2.text_model.encoder.layers.7.self_attn.k_proj.weight",
)


@dataclass(frozen=True)
class FullDelta:
    module: str
    part: str
    difference: Tensor

    def change(self, base: Tensor) -> Tensor:
        return self.difference.float().view(base.shape)


@pytest.fixture(scope="module")
def parameters() -> dict[str, Tensor]:
    with torch.device("meta"):
        model = SimpleNamespace(
            unet=sdxl_base.unet(), text_encoder=sdxl_base.text_encoder(), text_encoder_2=sdxl_base.text_encoder_2()
        )
    generator = torch.Generator("cuda").manual_seed(0)
    half: dict[str, Any] = {"device": "cuda", "dtype": torch.float16, "generator": generator}
    return {name: torch.randn(meta.shape, **half) * 0.02 for name, meta in lora_parameters(model)}


@pytest.fixture(params=[False, True], ids=["contiguous", "channels-last"], scope="module")
def weights(parameters: dict[str, Tensor], request: pytest.FixtureRequest) -> Iterator[PatchableWeights]:
    yield PatchableWeights(parameters, channels_last=request.param)
    torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def bare(weights: PatchableWeights) -> None:
    weights.restore()
    weights.settle()


def a_lora(names: list[str], parameters: dict[str, Tensor], *, rank: int, seed: int, dtype: torch.dtype) -> list[Delta]:
    generator = torch.Generator("cuda").manual_seed(seed)
    drawn: list[Delta] = []
    for name in names:
        outputs, *inputs = parameters[name].shape
        columns = torch.Size(inputs).numel()
        down = torch.randn(rank, columns, device="cuda", generator=generator).to(dtype).cpu()
        up = torch.randn(outputs, rank, device="cuda", generator=generator).to(dtype).cpu()
        drawn.append(LowRankDelta(name.removesuffix(".weight"), down, up, 2e-3 * rank**0.5))
    return drawn


def matrices(parameters: dict[str, Tensor]) -> list[str]:
    return [name for name, parameter in parameters.items() if parameter.dim() > 1]


def assert_pristine(weights: PatchableWeights, parameters: dict[str, Tensor]) -> None:
    assert weights.changed() == []
    for name, parameter in parameters.items():
        assert torch.equal(weights[name].view(torch.int16), parameter.view(torch.int16)), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_kind_of_weight_is_the_base_and_the_deltas_rounded_once(
    weights: PatchableWeights, parameters: dict[str, Tensor], dtype: torch.dtype
) -> None:
    first = a_lora(list(LOOKED_AT), parameters, rank=20, seed=1, dtype=dtype)
    second = a_lora(list(LOOKED_AT[2:6]), parameters, rank=128, seed=2, dtype=dtype)
    weights.patch(weights.prepare([(first, 0.7), (second, -0.4)]))
    changes: dict[str, Tensor] = {}
    for deltas, scale in ((first, 0.7), (second, -0.4)):
        for delta in deltas:
            assert isinstance(delta, LowRankDelta)
            change = scale * delta.alpha / delta.rank * (delta.up.cuda().double() @ delta.down.cuda().double())
            name = f"{delta.module}.weight"
            changes[name] = changes.get(name, torch.zeros((), device="cuda")) + change.view(parameters[name].shape)
    for name, change in changes.items():
        expected = parameters[name].double() + change
        torch.testing.assert_close(weights[name].double(), expected, rtol=0.501 * 2.0**-10 + 1e-6, atol=1e-7)
    assert set(weights.changed()) == set(changes)


def test_the_kernel_and_its_twin_agree_on_every_weight(
    weights: PatchableWeights, parameters: dict[str, Tensor]
) -> None:
    patch = weights.prepare([(a_lora(matrices(parameters), parameters, rank=32, seed=3, dtype=torch.float16), 1.0)])
    weights.patch(patch)
    patched = [stack.live.clone() for stack in weights._stacks]
    for packed in patch.low_rank:
        patch_rows_by_torch(weights._stacks[packed.stack], packed)
    for stack, live in zip(weights._stacks, patched, strict=True):
        torch.testing.assert_close(stack.live, live, rtol=1.01 * 2.0**-10, atol=1e-7)


def test_random_switches_change_no_weight_and_no_address(
    weights: PatchableWeights, parameters: dict[str, Tensor]
) -> None:
    chance = random.Random(4)
    names, vectors = matrices(parameters), [name for name in parameters if name.endswith(".bias")]
    places = {name: weights[name].data_ptr() for name in parameters}
    for seed in range(12):
        rank = chance.choice([1, 8, 32, 100])
        chosen = chance.sample(names, chance.choice([2, 100, 400]))
        odd = [
            FullDelta(*_split(name), torch.ones(parameters[name].shape).half()) for name in chance.sample(vectors, 5)
        ]
        lora = a_lora(chosen, parameters, rank=rank, seed=seed, dtype=chance.choice([torch.float16, torch.float32]))
        weights.patch(weights.prepare([(lora, 1.0), (odd, 0.5)]))
        assert set(weights.changed()) == {*chosen, *(f"{delta.module}.{delta.part}" for delta in odd)}
        weights.check(weights.sample())
    weights.patch(weights.prepare([]))
    assert_pristine(weights, parameters)
    assert places == {name: weights[name].data_ptr() for name in parameters}


def _split(name: str) -> tuple[str, str]:
    module, _, part = name.rpartition(".")
    return module, part


def test_a_patch_that_is_dropped_at_once_is_used_before_its_memory_is(
    weights: PatchableWeights, parameters: dict[str, Tensor]
) -> None:
    """Guards `Patch.arrive`: the stream waits for the copy, and the next patch does not overwrite this one's memory."""
    names = list(LOOKED_AT)
    lora = a_lora(names, parameters, rank=64, seed=5, dtype=torch.float16)
    weights.patch(weights.prepare([(lora, 1.0)]))
    expected = {name: weights[name].clone() for name in names}
    others = [a_lora(names, parameters, rank=64, seed=seed, dtype=torch.float16) for seed in (6, 7)]
    weights.restore()
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]  # about 0.1 s, in which all of this is queued
    weights.patch(weights.prepare([(lora, 1.0)]))
    kept = [weights.prepare([(other, 1.0)]) for other in others]
    torch.cuda.synchronize()
    assert len(kept) == 2
    assert all(torch.equal(weights[name], expected[name]) for name in names)


def test_a_captured_graph_sees_patches_and_restores_which_are_prepared_in_another_thread(
    weights: PatchableWeights, parameters: dict[str, Tensor]
) -> None:
    name = LOOKED_AT[2]
    x = torch.randn(64, parameters[name].shape[1], device="cuda", dtype=torch.float16)
    y = torch.empty(64, parameters[name].shape[0], device="cuda", dtype=torch.float16)
    torch.mm(x, weights[name].t(), out=y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.mm(x, weights[name].t(), out=y)
    graph.replay()
    base = y.clone()
    prepared: list[Any] = []
    lora = a_lora([name], parameters, rank=8, seed=8, dtype=torch.float16)
    thread = threading.Thread(target=lambda: prepared.append(weights.prepare([(lora, 1.0)])))
    thread.start()
    for _ in range(100):
        graph.replay()
    thread.join()
    assert torch.equal(y, base)
    weights.patch(prepared[0])
    graph.replay()
    assert not torch.equal(y, base)
    weights.restore()
    graph.replay()
    assert torch.equal(y, base)


def test_a_foreign_bit_is_seen_within_a_hundred_samples(
    weights: PatchableWeights, parameters: dict[str, Tensor]
) -> None:
    weights["unet.conv_out.weight"].view(torch.int16)[3, 1, 2, 2] ^= 1
    seen = sum((weights.sample() for _ in range(100)), start=torch.zeros((), device="cuda"))
    with pytest.raises(WeightsChanged, match="1 of the model's parameters"):
        weights.check(seen)
    assert_pristine(weights, parameters)
