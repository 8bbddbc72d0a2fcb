"""Every Triton kernel against its twin in plain torch: on a GPU where there is one, else under Triton's interpreter."""

import math

import pytest
import torch
from torch import Tensor

from consumer.engine.fast.ops import Hidden, TorchOps

pytest.importorskip("triton")
import triton

from consumer.engine.fast import kernels
from consumer.engine.fast.triton_ops import TritonOps

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TORCH, TRITON = TorchOps(), TritonOps(has_descriptors=True, multiprocessors=2)

# height, width, channels, groups, channels of what is put behind: whole blocks, parts of blocks, odd rows
PICTURES = {"aligned": (8, 8, 64, 32, 64), "ragged": (6, 10, 40, 8, 24)}


@pytest.fixture(params=list(PICTURES.values()), ids=list(PICTURES))
def picture(request: pytest.FixtureRequest) -> tuple[int, int, int, int, int]:
    sizes: tuple[int, int, int, int, int] = request.param
    return sizes


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def half(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(DEVICE, torch.float16)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Equal up to one rounding to float16, relative to the largest value."""
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual.float(), expected.float(), rtol=1e-3, atol=5e-4 * float(expected.abs().max()))


def assert_same(actual: Hidden, expected: Hidden, groups: int) -> None:
    """The same features, and the same norm of them: what a kernel knows of a sum's moments is right."""
    assert torch.equal(actual.x, expected.x)
    assert actual.width == expected.width
    weight, bias = half(actual.x.shape[2]), half(actual.x.shape[2])
    norms = [
        ops.group_norm(hidden, weight, bias, groups=groups, eps=1e-5, silu=True)
        for ops, hidden in ((TRITON, actual), (TORCH, expected))
    ]
    assert_near(norms[0], norms[1])


@pytest.mark.parametrize("with_residual", [False, True])
def test_a_sum_and_its_norm(picture: tuple[int, int, int, int, int], with_residual: bool) -> None:
    height, width, channels, groups, _ = picture
    x, bias = half(2, height * width, channels), half(channels)
    residual = half(*x.shape) if with_residual else None
    joined = [ops.join(x, width, bias=bias, residual=residual) for ops in (TRITON, TORCH)]
    assert_same(joined[0], joined[1], groups)


def test_a_concatenation_and_its_norm(picture: tuple[int, int, int, int, int]) -> None:
    height, width, channels, _, more = picture
    first, second = half(2, height * width, channels), half(2, height * width, more)
    joined = [ops.concat(first, second, width) for ops in (TRITON, TORCH)]
    assert_same(joined[0], joined[1], groups=8)


@pytest.mark.parametrize("with_second", [False, True])
def test_four_phases_become_one_picture(picture: tuple[int, int, int, int, int], with_second: bool) -> None:
    height, width, channels, _, more = picture
    phases, bias = half(2, (height // 2 + 1) * (width // 2 + 1), 4 * channels), half(channels)
    second = half(2, height * width, more) if with_second else None
    joined = [ops.interleave(phases, width, bias=bias, second=second) for ops in (TRITON, TORCH)]
    assert_same(joined[0], joined[1], groups=8)


@pytest.mark.parametrize("silu", [False, True])
def test_a_group_norm_of_what_no_kernel_has_seen_before_with_a_shift(
    picture: tuple[int, int, int, int, int], silu: bool
) -> None:
    height, width, channels, groups, _ = picture
    hidden = Hidden(half(2, height * width, channels, scale=3.0), width)
    shift = torch.randn(2, channels + 5, device=DEVICE)[:, 3 : 3 + channels]  # a slice of a table
    weight, bias = half(channels), half(channels)
    norms = [
        ops.group_norm(hidden, weight, bias, groups=groups, eps=1e-6, silu=silu, shift=shift) for ops in (TRITON, TORCH)
    ]
    assert_near(norms[0], norms[1])


def test_a_group_norm_far_from_zero_does_not_cancel() -> None:
    """Guards the moments' way to add up: E[x^2] - E[x]^2 in float32 would be all error here."""
    x = (1000 + torch.randn(1, 4096, 8)).to(DEVICE, torch.float16)
    weight, bias = torch.ones(8, device=DEVICE).half(), torch.zeros(8, device=DEVICE).half()
    norm = TRITON.group_norm(Hidden(x, 64), weight, bias, groups=8, eps=1e-5, silu=False)
    expected = (x.double() - x.double().mean(1)) / x.double().std(1, correction=0)
    torch.testing.assert_close(norm.double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("channels", [64, 640, 1280])
def test_layer_norms_with_and_without_a_sum_before(channels: int) -> None:
    x, change, change_bias, weight, bias = half(5, channels), half(5, channels), *(half(channels) for _ in range(3))
    assert_near(TRITON.layer_norm(x, weight, bias), TORCH.layer_norm(x, weight, bias))
    actual = TRITON.add_layer_norm(x, change, change_bias, weight, bias)
    expected = TORCH.add_layer_norm(x, change, change_bias, weight, bias)
    assert torch.equal(actual[0], expected[0])
    assert_near(actual[1], expected[1])


@pytest.mark.parametrize("has_descriptors", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "depth"), [(7, 128, 64), (130, 136, 96), (1153, 136, 32)], ids=["aligned", "ragged", "many"]
)
def test_the_gated_linear_layer(has_descriptors: bool, rows: int, width: int, depth: int) -> None:
    x, weight, bias = half(rows, depth), half(2 * width, depth, scale=0.1), half(2 * width)
    ops = TritonOps(has_descriptors=has_descriptors, multiprocessors=2)
    assert_near(ops.geglu(x, weight, bias), TORCH.geglu(x, weight, bias))


def test_the_gate_is_the_exact_one_rounded_once() -> None:
    """Guards `_gelu`, nearly everywhere: where the exact value is in the middle of two, either may be taken."""
    gates = torch.cat([torch.linspace(-8, 8, 20_001), torch.tensor([-6e4, -0.0, 0.0, 1e-7, 6e4])]).half()
    out = torch.empty(1, len(gates), dtype=torch.float16, device=DEVICE)
    x = torch.cat([torch.ones_like(gates), gates])[None].to(DEVICE)
    kernels.gate[(1, triton.cdiv(len(gates), 512))](x, out, 1, len(gates), BLOCK_ROWS=1, BLOCK_WIDTH=512)
    exact = gates.double() * torch.special.erfc(-gates.double() / math.sqrt(2)) / 2
    assert (out[0].cpu() == exact.half()).double().mean() > 0.998
    torch.testing.assert_close(out[0].cpu().double(), exact, rtol=2**-11 * 1.01, atol=2**-25 * 1.5)


def test_a_gate_that_is_no_number_stays_none() -> None:
    """Guards `_gelu`: a picture of NaN is refused, where it is seen."""
    x = torch.tensor([[1.0, 1.0, 1.0, math.nan, math.inf, -math.inf]], dtype=torch.float16, device=DEVICE)
    out = torch.empty(1, 3, dtype=torch.float16, device=DEVICE)
    kernels.gate[(1, 1)](x, out, 1, 3, BLOCK_ROWS=1, BLOCK_WIDTH=512)
    assert out.isnan().tolist() == [[True, False, False]]
    assert out[0, 1:].tolist() == [math.inf, 0.0]


@pytest.mark.parametrize("head", [32, 64])
def test_attention_to_a_text(head: int) -> None:
    query = half(2, 150, 3 * head).view(2, 150, 3, head).transpose(1, 2)
    text = half(2, 77, 2, 3, head)
    key, value = text[:, :, 0].transpose(1, 2), text[:, :, 1].transpose(1, 2)
    expected = TORCH.attend_text(query.float(), key.float(), value.float()).half()
    torch.testing.assert_close(TRITON.attend_text(query, key, value), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_step_of_the_solver(batch: int) -> None:
    noise, latents, inputs = half(batch, 8, 8, 4), torch.randn(1, 8, 8, 4, device=DEVICE), half(batch, 8, 8, 4)
    sigmas = torch.tensor([3.0, 2.0, 1.0, 0.0], device=DEVICE)
    index, guidance = torch.tensor([1], device=DEVICE), torch.tensor([5.5], device=DEVICE)
    results = []
    for ops in (TRITON, TORCH):
        own_latents, own_inputs = latents.clone(), inputs.clone()
        ops.euler(noise, own_latents, own_inputs, sigmas, index, guidance)
        results.append((own_latents, own_inputs))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert_near(results[0][1], results[1][1])
