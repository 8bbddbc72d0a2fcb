"""The container: what the format's own reader refuses, and what it lets through and we do not."""

import io
import json
import pickle
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from consumer.errors import LoraInvalid
from consumer.lora.formats import parse
from consumer.lora.tensors import FileTensors
from schemas.lora.errors import LoraUnusable
from schemas.lora.header import read_header
from schemas.lora.shapes import ModelShapes
from tests.lora_bytes import ACCEPTED_BY_THE_FORMAT, DOWN, REFUSED_BY_THE_FORMAT, UP, entry, framed, pair, with_tensors

MODEL = ModelShapes({"unet.mid": (2, 2)}, {"unet.mid": "unet.mid"}, {}, cross_attention_dim=8)


def written(folder: Path, raw: bytes) -> Path:
    path = folder / "lora.safetensors"
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("raw", REFUSED_BY_THE_FORMAT.values(), ids=REFUSED_BY_THE_FORMAT.keys())
def test_bytes_that_are_not_safetensors_are_refused_by_the_header_alone(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(LoraUnusable, match="not a valid safetensors file"):
        read_header(written(tmp_path, raw))


@pytest.mark.parametrize("raw", ACCEPTED_BY_THE_FORMAT.values(), ids=ACCEPTED_BY_THE_FORMAT.keys())
def test_bytes_that_are_safetensors_but_no_lora_are_refused(tmp_path: Path, raw: bytes) -> None:
    safetensors.torch.load(raw)  # the format's own reader has nothing against them
    with pytest.raises(LoraInvalid):
        parse(written(tmp_path, raw), MODEL)


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "pickle"])
def test_what_torch_saves_under_another_name_is_told(tmp_path: Path, new_format: bool) -> None:
    """Guards `_SIGNATURES`."""
    path = tmp_path / "lora.safetensors"
    torch.save({DOWN: torch.zeros(1, 2)}, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(LoraUnusable, match="it is a zip, as PyTorch's own" if new_format else "it is a pickle"):
        read_header(path)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        *((pickle.dumps({"lora": [1.0] * 100}, protocol), "it is a pickle") for protocol in (2, 3, 4, 5)),
        (b"\r\n <html>Not here</html>", "it is a web page"),
        (b"\x1f\x8b\x08" + bytes(100), "it is gzip"),
        (b"\x1f\x8c\x08" + bytes(100), "its header ends beyond the file"),
        (b"any text that is no file", "its header is longer than"),
    ],
    ids=["protocol 2", "protocol 3", "protocol 4", "protocol 5", "blanks before HTML", "gzip", "not gzip", "text"],
)
def test_what_a_file_is_instead_is_told_by_its_first_bytes(tmp_path: Path, raw: bytes, said: str) -> None:
    with pytest.raises(LoraUnusable, match=said):
        read_header(written(tmp_path, raw))


def test_a_length_that_begins_as_gzip_does_is_a_length(tmp_path: Path) -> None:
    """Guards that first bytes are looked at only where the length cannot be one."""
    header = json.dumps(pair()).encode().ljust(0x088B1F)
    assert struct.pack("<Q", len(header)).startswith(b"\x1f\x8b\x08")
    assert len(read_header(written(tmp_path, framed(header, bytes(16)))).tensors) == 2


BY_VALUE_OR_MEANING = {"NaN", "Inf", "keys that no LoRA has"}


@pytest.mark.parametrize("kind", sorted(ACCEPTED_BY_THE_FORMAT.keys() - BY_VALUE_OR_MEANING))
def test_all_but_values_and_meanings_are_seen_in_the_header(tmp_path: Path, kind: str) -> None:
    with pytest.raises(LoraUnusable, match="not a valid safetensors file"):
        read_header(written(tmp_path, ACCEPTED_BY_THE_FORMAT[kind]))


def test_the_smallest_lora_is_read(tmp_path: Path) -> None:
    parsed = parse(written(tmp_path, with_tensors(pair())), MODEL)
    assert [(delta.module, delta.part) for delta in parsed.deltas] == [("unet.mid", "weight")]


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
    assert torch.equal(FileTensors(path, header, ["half"])["half"], tensors["half"])


def test_tensors_do_not_change_with_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, with_tensors(pair()))
    tensors = FileTensors(path, read_header(path), [DOWN])
    with path.open("r+b") as file:
        file.seek(-16, io.SEEK_END)
        file.write(b"\x7f" * 16)
    assert torch.equal(tensors[DOWN], torch.zeros(1, 2))


def test_a_file_that_breaks_between_header_and_tensors_is_refused(tmp_path: Path) -> None:
    header = read_header(written(tmp_path, with_tensors(pair())))
    with pytest.raises(LoraUnusable, match="cut short"):
        FileTensors(written(tmp_path, with_tensors(pair())[:-1]), header, [DOWN, UP])


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
    assert all(torch.isfinite(delta.change(torch.zeros(2, 2))).all() for delta in parsed.deltas)
