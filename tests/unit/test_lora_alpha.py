"""An alpha is the number that its bytes mean, in every dtype that trainers write."""

import json
import math
from pathlib import Path

import pytest
import torch

from schemas.lora.alpha import read_alpha
from schemas.lora.errors import LoraUnusable
from schemas.lora.header import read_header
from tests.lora_bytes import framed


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)],
    ids=["E4M3", "E5M2"],
)
def test_each_of_the_256_bytes_is_the_number_that_torch_reads(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Guards `_from_e4m3` and `_UPPER_HALVES`."""
    entries = {f"m{byte}.alpha": {"dtype": name, "shape": [], "data_offsets": [byte, byte + 1]} for byte in range(256)}
    path = tmp_path / "alphas"
    path.write_bytes(framed(json.dumps(entries).encode(), bytes(range(256))))
    header = read_header(path)
    expected = torch.arange(256, dtype=torch.uint8).view(dtype).double().tolist()
    with path.open("rb") as file:
        for tensor, number in zip(entries, expected, strict=True):
            if math.isfinite(number):
                assert read_alpha(tensor, header, file) == number, tensor
            else:
                with pytest.raises(LoraUnusable, match="has NaN or Inf"):
                    read_alpha(tensor, header, file)
