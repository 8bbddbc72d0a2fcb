"""A file's tensors, and the largest of their numbers told from their bits."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from consumer.lora.algebra import DoraDelta, FullDelta, HadamardDelta, KroneckerDelta, Matrix
from consumer.lora.bounds import MAX_CHANGE, KnownDelta, is_small, longest, no_longer_than
from consumer.lora.deltas import LowRankDelta
from consumer.lora.tensors import FileTensors
from schemas.lora.header import read_header
from tests.lora_bytes import framed

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
NAMES = ["float32", "float16", "bfloat16", "e4m3", "e5m2"]


def tensors(path: Path, found: dict[str, Tensor]) -> FileTensors:
    save_file(found, path)
    return FileTensors(path, read_header(path), found)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_the_largest_number_is_found_by_its_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    """Guards `FileTensors.largest`, in more than one chunk, against what torch finds."""
    numbers = torch.randn(300_001, generator=torch.Generator().manual_seed(1)).to(dtype)
    special = {
        "negative": -3.0,
        "zero": -0.0,
        "tiny": 2.0**-9,
        "inf": math.inf,
        "minus inf": -math.inf,
        "nan": math.nan,
    }
    alone = {name: torch.tensor([value, 0.0]).to(dtype) for name, value in special.items()}
    found = tensors(tmp_path / "x", {"numbers": numbers, **alone})
    assert found.largest("numbers") == float(numbers.float().abs().max())
    for name, tensor in alone.items():
        expected = float(tensor.float().abs().max())
        assert found.largest(name) == expected or (math.isnan(expected) and not math.isfinite(found.largest(name)))


@given(raw=st.binary(min_size=4, max_size=4), number=st.integers(0, len(DTYPES) - 1))
def test_any_bits_are_as_large_as_torch_says(tmp_path_factory: pytest.TempPathFactory, raw: bytes, number: int) -> None:
    tensor = torch.frombuffer(bytearray(raw), dtype=DTYPES[number])
    largest = tensors(tmp_path_factory.getbasetemp() / "bits", {"x": tensor}).largest("x")
    expected = tensor.float().abs()
    assert largest == float(expected.max()) if torch.isfinite(expected).all() else not math.isfinite(largest)


def test_tensors_that_begin_anywhere_are_read(tmp_path: Path) -> None:
    """Guards `clone` in `FileTensors.__getitem__`: the format asks for no alignment, and torch does."""
    first, second = torch.tensor([1, 2, 3], dtype=torch.uint8), torch.tensor([1.5, -2.5])
    header = {
        "odd": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [0, 3]},
        "later": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    path = tmp_path / "odd"
    path.write_bytes(framed(json.dumps(header).encode(), first.numpy().tobytes() + second.numpy().tobytes()))
    found = FileTensors(path, read_header(path), header)
    assert torch.equal(found["later"], second)
    assert found.largest("later") == 2.5
    assert torch.equal(found["odd"], first.view(torch.float8_e4m3fn).half())


def test_what_is_not_asked_for_takes_no_memory(tmp_path: Path) -> None:
    """Guards `_spans`: small gaps are read with the rest, large ones are not."""
    found = {"a": torch.ones(8), "b": torch.zeros(8), "c": torch.ones(8), "d": torch.zeros(9000), "e": torch.ones(8)}
    path = tmp_path / "x"
    save_file(found, path)
    read = FileTensors(path, read_header(path), ["e", "a", "c"])
    assert all(torch.equal(read[name], torch.ones(8)) for name in "ace")
    assert read["a"].untyped_storage().nbytes() == 3 * 8 * 4
    assert read["e"].untyped_storage().nbytes() == 8 * 4
    assert read["a"].untyped_storage().data_ptr() == read["c"].untyped_storage().data_ptr()


def of_every_kind(value: float) -> dict[str, KnownDelta]:
    """Deltas of one number throughout, for which no bound is loose."""

    def matrix(rows: int, rank: int, columns: int) -> Matrix:
        return Matrix(torch.full((rows, rank), value), torch.full((rank, columns), value))

    low_rank = LowRankDelta("m", torch.full((2, 8), value), torch.full((6, 2), -value), 3.0)
    return {
        "low rank": low_rank,
        "Hadamard": HadamardDelta("m", matrix(6, 2, 8), matrix(6, 2, 8), 0.7),
        "Kronecker": KroneckerDelta("m", Matrix(torch.full((2, 4), value)), matrix(3, 3, 2), -1.5),
        "full": FullDelta("m", "weight", torch.full((6, 8), -value), 0.5),
        "DoRA": DoraDelta(low_rank, torch.full((6,), value), 0),
    }


@pytest.mark.parametrize("kind", ["low rank", "Hadamard", "Kronecker", "full", "DoRA"])
def test_no_change_that_is_called_small_is_large(kind: str) -> None:
    """Guards every case of `bounds._bounds`, and both norms: a change is never larger than was said."""
    verdicts = set()
    for quarter in range(80):
        value = 2.0 ** (quarter / 4)
        delta = of_every_kind(value)[kind]
        largest = float(delta.change(torch.zeros(6, 8)).abs().max())
        exact, rough = is_small(delta, longest), is_small(delta, no_longer_than(value))
        assert rough <= exact <= (largest < MAX_CHANGE)
        verdicts.add((exact, rough))
    assert {(True, True), (False, False)} <= verdicts
