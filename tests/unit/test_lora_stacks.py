"""Where parameters lie in memory, and what is seen of their bits."""

import pytest
import torch

from consumer.lora.stacks import Place, Stack, runs
from consumer.lora.weights import PatchableWeights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def parameters() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {
        "unet.conv_in.weight": (6, 4, 3, 3),
        "unet.to_q.weight": (8, 5),
        "unet.proj.weight": (5, 8),
        "unet.to_k.weight": (8, 5),
        "unet.to_v.weight": (8, 5),
        "unet.shortcut.weight": (6, 4, 1, 1),
        "unet.to_q.bias": (8,),
        "unet.odd.bias": (3,),
    }
    return {name: torch.randn(shape, generator=generator).half() for name, shape in shapes.items()}


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
def test_every_parameter_has_its_values_and_shape_and_a_place_of_its_own(
    parameters: dict[str, torch.Tensor], channels_last: bool
) -> None:
    weights = PatchableWeights(parameters, channels_last=channels_last)
    for name, parameter in parameters.items():
        assert torch.equal(weights[name], parameter)
        assert weights[name].data_ptr() != parameter.data_ptr()
        assert weights[name].data_ptr() == weights[name].data_ptr()
        layout = torch.channels_last if channels_last and parameter.dim() == 4 else torch.contiguous_format
        assert weights[name].is_contiguous(memory_format=layout)
    assert len({weights[name].data_ptr() for name in parameters}) == len(parameters)
    if channels_last:
        assert weights["unet.conv_in.weight"].stride() == (36, 1, 12, 4)


def test_weights_of_one_shape_that_follow_each_other_are_one_matrix(parameters: dict[str, torch.Tensor]) -> None:
    weights = PatchableWeights(parameters)
    names = [f"unet.to_{letter}.weight" for letter in "qkv"]
    matrix = weights.rows(names[0], 3)
    assert torch.equal(matrix, torch.cat([parameters[name] for name in names]))
    assert matrix.data_ptr() == weights[names[0]].data_ptr()
    weights[names[2]].fill_(7)
    assert (weights.rows(names[1], 2)[8:] == 7).all()
    with pytest.raises(ValueError, match="only 2 weights of its shape begin with unet"):
        weights.rows(names[1], 3)


def test_adjacent_places_are_one_run() -> None:
    places = [Place(1, 0), Place(0, 4), Place(0, 5), Place(1, 1), Place(0, 7), Place(2, 2), Place(2, 3)]
    assert list(runs(places)) == [(0, slice(4, 6)), (0, slice(7, 8)), (1, slice(0, 2)), (2, slice(2, 4))]
    assert list(runs([])) == []


def test_a_hundred_samples_are_one_round() -> None:
    """Guards `SAMPLES` and `_next_places`."""
    weights = PatchableWeights({f"unet.{number}.bias": torch.zeros(8) for number in range(400)})
    weights["unet.399.bias"][0] = 1
    assert [bool(weights.sample()) for _ in range(200)] == ([False] * 99 + [True]) * 2


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((4, 6), torch.float16),
        ((6,), torch.bfloat16),
        ((3,), torch.float16),
        ((3, 1), torch.float32),
        ((5, 1), torch.float64),
    ],
    ids=["words of 8", "words of 4", "words of 2", "float32", "float64"],
)
def test_every_single_bit_of_a_row_is_seen_in_the_live_and_in_the_pristine_row(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Guards `_words` and `_sums`."""
    stack = Stack.of([torch.randn(shape).to(dtype) for _ in range(3)], channels_last=False)
    whole = slice(None)
    assert stack.differing(whole).tolist() == stack.rotted(whole).tolist() == [False] * 3
    for twin, seen in ((stack.live, stack.differing), (stack.pristine, stack.rotted)):
        row = twin[1].view(-1).view(torch.uint8)
        for byte in range(len(row)):
            for bit in range(8):
                row[byte] ^= 1 << bit
                assert seen(whole).tolist() == [False, True, False]
                assert seen(slice(1, 2)).tolist() == [True]
                row[byte] ^= 1 << bit
    assert stack.rotted(whole).tolist() == [False] * 3


def test_a_zero_is_not_the_other_zero_and_a_nan_is_itself() -> None:
    stack = Stack.of([torch.tensor([0.0, float("nan")])], channels_last=False)
    assert stack.differing(slice(None)).tolist() == [False]
    stack.live[0, 0] = -0.0
    assert stack.differing(slice(None)).tolist() == [True]
