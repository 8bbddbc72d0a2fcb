"""The container: what the format's own reader refuses, and what it lets through and we do not."""

import gzip
import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from consumer.errors import LoraInvalid
from consumer.lora.formats import parse
from consumer.lora.header import MAX_HEADER_BYTES, MAX_TENSORS, read_header, read_tensors
from consumer.lora.shapes import ModelShapes

DOWN = "unet.mid.lora_A.weight"
UP = "unet.mid.lora_B.weight"
MODEL = ModelShapes({"unet.mid": (2, 2)}, {"unet.mid": "unet.mid"}, {}, cross_attention_dim=8)


def entry(start: int, end: int, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [1, (end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


def framed(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def with_tensors(entries: dict[str, Any], data_bytes: int = 16) -> bytes:
    return framed(json.dumps(entries).encode(), bytes(data_bytes))


def pair(**changed: Any) -> dict[str, Any]:
    """A LoRA of rank 1 for a [2, 2] weight, with the fields of its second tensor changed."""
    return {DOWN: entry(0, 8), UP: entry(8, 16, shape=[2, 1]) | changed}


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.pkl", b"x")
    return file.getvalue()


def pairs_text(second_key: str, second: dict[str, Any]) -> bytes:
    first, last = json.dumps(entry(0, 8)), json.dumps(second)
    return f'{{"{DOWN}": {first}, "{second_key}": {last}}}'.encode()


REFUSED_BY_THE_FORMAT = {
    "an empty file": b"",
    "7 bytes": b"\x01" * 7,
    "a header of 2^64-1 bytes": framed(b"{}", length=2**64 - 1),
    "a header of 100 MB and a byte": framed(b"{}", length=100_000_001),
    "a header beyond the end": framed(b"{}", length=3),
    "no JSON": framed(b"{oops"),
    "no UTF-8": framed(b'{"\xff": 1}'),
    "a list": framed(b"[]"),
    "null": framed(b"null"),
    "a BOM": framed(b"\xef\xbb\xbf" + json.dumps(pair()).encode(), bytes(16)),
    "a blank before the object": framed(b" " + json.dumps(pair()).encode(), bytes(16)),
    "conflicting duplicates": framed(pairs_text(DOWN, entry(8, 16)), bytes(16)),
    "an overlap": with_tensors({DOWN: entry(0, 8), UP: entry(4, 12)}, 12),
    "a hole": with_tensors({DOWN: entry(0, 8), UP: entry(12, 20)}, 20),
    "a hole at the start": with_tensors({DOWN: entry(4, 12)}, 12),
    "reversed offsets": with_tensors(pair(data_offsets=[16, 8])),
    "negative offsets": with_tensors(pair(data_offsets=[-8, 0])),
    "three offsets": with_tensors(pair(data_offsets=[8, 12, 16])),
    "trailing bytes": with_tensors(pair(), 17),
    "a truncated file": with_tensors(pair(), 15),
    "a shape that does not fit the bytes": with_tensors(pair(shape=[3, 1])),
    "a negative shape": with_tensors(pair(shape=[-2, -1])),
    "a shape of floats": with_tensors(pair(shape=[2.0, 1])),
    "a shape of strings": with_tensors(pair(shape=["2", 1])),
    "a shape of booleans": with_tensors(pair(shape=[True, 2])),
    "a shape that is a string": with_tensors(pair(shape="2")),
    "a shape that overflows": with_tensors(pair(shape=[2**63, 2])),
    "an unknown dtype": with_tensors(pair(dtype="F33")),
    "a dtype that is a number": with_tensors(pair(dtype=32)),
    "an entry without a dtype": with_tensors({DOWN: {"shape": [1, 4], "data_offsets": [0, 16]}}),
    "an entry with a field too many": with_tensors(pair(extra=1)),
    "an entry that is a number": with_tensors({DOWN: 1}),
    "metadata that are numbers": with_tensors({"__metadata__": {"a": 1}} | pair()),
    "metadata that are a list": with_tensors({"__metadata__": ["a"]} | pair()),
    "deep JSON": framed(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "a pickle": pickle.dumps({"lora": [1.0]}),
    "a zip": zipped(),
    "an HTML page": b"<!doctype html><html><body>Not here</body></html>",
    "a gzip": gzip.compress(b"x" * 100),
    "an XML error page": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "an LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "5001 dimensions": with_tensors(pair(shape=[2] + [1] * 5000)),
}
ACCEPTED_BY_THE_FORMAT = {
    "no tensors": framed(b"{}"),
    "identical duplicates": framed(pairs_text(DOWN, entry(0, 8)), bytes(8)),
    "tensors of no bytes that share an offset": with_tensors({DOWN: entry(0, 0, [0, 2]), UP: entry(0, 0, [2, 0])}, 0),
    "a dimension of 0 beside a huge one": with_tensors({DOWN: entry(0, 0, [0, 2**40])}, 0),
    "an empty name": with_tensors({"": entry(0, 16)}),
    "a name that is a path": with_tensors({"../../etc.lora_A.weight": entry(0, 16)}),
    "a name with a NUL": with_tensors({"unet.\0mid.lora_A.weight": entry(0, 16)}),
    "a name with a backslash": with_tensors({"unet\\mid.lora_A.weight": entry(0, 16)}),
    "more tensors than any LoRA has": with_tensors(
        {f"a{i}": entry(4 * i, 4 * i + 4) for i in range(MAX_TENSORS + 1)}, 4 * MAX_TENSORS + 4
    ),
    "a header above the cap": framed(json.dumps(pair()).encode().ljust(MAX_HEADER_BYTES + 1), bytes(16)),
    "NaN": with_tensors(pair())[:-8] + struct.pack("<2f", float("nan"), 1.0),
    "Inf": with_tensors(pair())[:-8] + struct.pack("<2f", 1.0, float("-inf")),
    "keys that no LoRA has": with_tensors(pair() | {"extra": entry(16, 20)}, 20),
}


def written(folder: Path, raw: bytes) -> Path:
    path = folder / "lora.safetensors"
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("raw", REFUSED_BY_THE_FORMAT.values(), ids=REFUSED_BY_THE_FORMAT.keys())
def test_bytes_that_are_not_safetensors_are_refused_by_the_header_alone(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(LoraInvalid, match="not a valid safetensors file"):
        read_header(written(tmp_path, raw))


@pytest.mark.parametrize("raw", ACCEPTED_BY_THE_FORMAT.values(), ids=ACCEPTED_BY_THE_FORMAT.keys())
def test_bytes_that_are_safetensors_but_no_lora_are_refused(tmp_path: Path, raw: bytes) -> None:
    safetensors.torch.load(raw)  # the format's own reader has nothing against them
    with pytest.raises(LoraInvalid):
        parse(written(tmp_path, raw), MODEL)


BY_VALUE_OR_MEANING = {"NaN", "Inf", "keys that no LoRA has"}


@pytest.mark.parametrize("kind", sorted(ACCEPTED_BY_THE_FORMAT.keys() - BY_VALUE_OR_MEANING))
def test_all_but_values_and_meanings_are_seen_in_the_header(tmp_path: Path, kind: str) -> None:
    with pytest.raises(LoraInvalid, match="not a valid safetensors file"):
        read_header(written(tmp_path, ACCEPTED_BY_THE_FORMAT[kind]))


def test_the_smallest_lora_is_read(tmp_path: Path) -> None:
    parsed = parse(written(tmp_path, with_tensors(pair())), MODEL)
    assert [(delta.module, delta.rank) for delta in parsed.deltas] == [("unet.mid", 1)]


def test_what_the_format_writes_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "any.safetensors"
    tensors = {"scalar": torch.tensor(2.0), "half": torch.ones(3, 2, dtype=torch.float16), "long": torch.arange(4)}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == {
        "scalar": ("F32", ()),
        "half": ("F16", (3, 2)),
        "long": ("I64", (4,)),
    }
    read = read_tensors(path, ["half"])
    assert torch.equal(read["half"], tensors["half"])


def test_tensors_do_not_change_with_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, with_tensors(pair()))
    tensors = read_tensors(path, [DOWN])
    with path.open("r+b") as file:
        file.seek(-16, io.SEEK_END)
        file.write(b"\x7f" * 16)
    assert torch.equal(tensors[DOWN], torch.zeros(1, 2))


def test_a_file_that_breaks_between_header_and_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoraInvalid, match="its reader refuses it"):
        read_tensors(written(tmp_path, b"no longer"), [DOWN])


def test_a_file_that_is_not_there_is_no_fault_of_the_lora(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "missing.safetensors")


def test_a_refusal_shows_no_more_of_a_name_than_is_fit_to_see(tmp_path: Path) -> None:
    name = "\u202e" + "é" * 300 + ".lora_A.weight"
    with pytest.raises(LoraInvalid) as refusal:
        parse(written(tmp_path, with_tensors({name.lstrip("\u202e"): entry(0, 16)})), MODEL)
    assert str(refusal.value).isascii()
    assert len(str(refusal.value)) < 250


@given(raw=st.binary(max_size=200), frame=st.booleans())
def test_no_bytes_at_all_raise_anything_else(tmp_path_factory: pytest.TempPathFactory, raw: bytes, frame: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(framed(raw) if frame else raw)
    with pytest.raises(LoraInvalid):
        parse(path, MODEL)


@given(position=st.integers(0, 300), byte=st.integers(0, 255))
def test_a_flipped_byte_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, position: int, byte: int) -> None:
    raw = bytearray(with_tensors(pair()))
    raw[position % len(raw)] = byte
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    path.write_bytes(raw)
    try:
        parsed = parse(path, MODEL)
    except LoraInvalid:
        return
    assert all(torch.isfinite(delta.up).all() for delta in parsed.deltas)
