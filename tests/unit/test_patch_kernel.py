"""The GPU's kernel against the formula in float64, and against its twin in torch.

Without a GPU, Triton interprets it.
"""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from consumer.lora.deltas import LowRankDelta
from consumer.lora.low_rank import DeltaBuffer, PackedDeltas, Parts, patch_rows_by_torch
from consumer.lora.stacks import Stack

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Triton's interpreter and numpy 2.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]

Check = Callable[[Stack, Mapping[int, Parts]], None]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# The interpreter multiplies the bit patterns of bfloat16, and cuts numbers off where a GPU rounds them.
EXACT = DEVICE == "cuda"


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture(scope="module")
def patch_rows() -> Callable[[Stack, PackedDeltas], None]:
    pytest.importorskip("triton")
    from consumer.lora import patch_kernel

    return patch_kernel.patch_rows


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def a_stack(*shape: int, dtype: torch.dtype, rows: int = 4, channels_last: bool = False) -> Stack:
    parameters = [drawn(*shape, dtype=dtype, seed=seed).to(DEVICE) for seed in range(rows)]
    return Stack.of(parameters, channels_last=channels_last)


def a_delta(stack: Stack, rank: int, *, dtype: torch.dtype, seed: int, alpha: float = 3.0) -> LowRankDelta:
    down = drawn(rank, stack.inputs, dtype=dtype, seed=seed)
    return LowRankDelta("unet.conv_in", down, drawn(stack.outputs, rank, dtype=dtype, seed=seed + 1), alpha)


def packed_of(stack: Stack, rows: Mapping[int, Parts]) -> PackedDeltas:
    buffer = DeltaBuffer({0: rows}, [stack], pin=False)
    (packed,) = buffer.packed(buffer.bytes.to(DEVICE))
    return packed


@pytest.fixture
def check(patch_rows: Callable[[Stack, PackedDeltas], None]) -> Check:
    """Finds the rows right to one rounding, no other row touched, and the twin of the same opinion."""

    def checked(stack: Stack, rows: Mapping[int, Parts]) -> None:
        packed = packed_of(stack, rows)
        stack.live.fill_(7)
        patch_rows(stack, packed)
        epsilon = torch.finfo(stack.live.dtype).eps * (1 if EXACT or stack.live.dtype != torch.bfloat16 else 2)
        for row in range(len(stack.live)):
            if row not in rows:
                assert (stack.live[row] == 7).all()
                continue
            expected = stack.shaped(stack.pristine[row]).double().cpu()
            for delta, scale in rows[row]:
                change = delta.up.double() @ delta.down.double()
                expected = expected + scale * delta.alpha / delta.rank * change.view(expected.shape)
            live = stack.shaped(stack.live[row]).double().cpu()
            torch.testing.assert_close(live, expected, rtol=0.501 * epsilon + 5e-7, atol=2e-5)
        patched = stack.live.clone()
        patch_rows_by_torch(stack, packed)
        torch.testing.assert_close(stack.live.double(), patched.double(), rtol=1.01 * epsilon + 1e-6, atol=2e-5)

    return checked


@pytest.mark.parametrize("base", DTYPES, ids=name)
@pytest.mark.parametrize("half", DTYPES if EXACT else [torch.float16, torch.float32], ids=name)
def test_every_dtype_of_model_and_file(check: Check, base: torch.dtype, half: torch.dtype) -> None:
    stack = a_stack(96, 160, dtype=base)
    check(
        stack, {1: [(a_delta(stack, 20, dtype=half, seed=1), 0.7)], 3: [(a_delta(stack, 4, dtype=half, seed=5), 1.0)]}
    )


@pytest.mark.parametrize(
    "shape", [(320, 4, 3, 3), (4, 320, 3, 3), (5, 7), (1, 1), (64, 128), (65, 129), (130, 48, 1, 1)],
    ids=["conv_in", "conv_out", "5x7", "1x1", "a tile", "over a tile", "a pointwise convolution"],
)  # fmt: skip
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
def test_every_shape(check: Check, shape: tuple[int, ...], channels_last: bool) -> None:
    stack = a_stack(*shape, dtype=torch.float16, channels_last=channels_last)
    check(stack, {0: [(a_delta(stack, 3, dtype=torch.float16, seed=1), -1.5)]})


def test_several_loras_of_different_ranks_and_dtypes_in_one_row_beside_others_in_other_rows(check: Check) -> None:
    stack = a_stack(70, 90, dtype=torch.float16)
    many: Parts = [
        (a_delta(stack, rank, dtype=dtype, seed=rank, alpha=rank / 2), scale)
        for rank, dtype, scale in [
            (1, torch.float16, 0.3),
            (16, torch.float32, 1.0),
            (33, torch.bfloat16, -0.5),
        ]  # in float32 together
    ]
    check(stack, {0: many, 2: many[1:2], 3: many[::-1]})


def test_what_rounds_to_nothing_in_half_precision_adds_up_first(
    patch_rows: Callable[[Stack, PackedDeltas], None],
) -> None:
    """Eight changes of a quarter of a unit in the last place are two units together: summed, then rounded once."""
    stack = a_stack(16, 16, dtype=torch.float16)
    stack.pristine.fill_(1.0)
    ones = torch.ones(1, 16).half()
    parts: Parts = [(LowRankDelta("unet.conv_in", ones, ones.t(), 2.0**-12), 1.0)] * 8
    patch_rows(stack, packed_of(stack, {0: parts}))
    assert (stack.live[0] == 1.0 + 2.0**-9).all()
