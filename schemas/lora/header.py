"""The safetensors container: its header is checked to the last byte before anything else reads the file.

Stricter than the format's own reader, which lets through empty files, identical duplicate keys, dimensions of 0, names
that are paths, and headers of 100 MB.
"""

import math
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from schemas import strict_json
from schemas.lora.errors import LoraUnusable

MAX_HEADER_BYTES = 4 * 1024 * 1024
MAX_TENSORS = 20_000
MAX_DIMENSIONS = 4

_LENGTH_BYTES = 8
_SIGNATURES = (
    (re.compile(rb"PK\x03\x04"), "a zip, as PyTorch's own files are"),
    (re.compile(rb"\x80[\x02-\x05]"), "a pickle"),
    (re.compile(rb"\x1f\x8b"), "gzip"),
    (re.compile(rb"version "), "a Git LFS pointer"),
    (re.compile(rb"<\?xml"), "XML, as storages answer with errors"),
    (re.compile(rb"\s*<"), "a web page"),
)
# An open string goes to the end, so that no quote is looked at twice.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[{\[,]', re.DOTALL)
_MAX_TOKENS = 16 * MAX_TENSORS  # a tensor of four dimensions has 15
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as the header has it. `start`, `end`: offsets in bytes behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: tensors by name, and the free-text metadata. `data_start`: offset in bytes of what follows."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def read_header(path: Path) -> Header:
    """Reads and checks a file's header.

    Raises LoraUnusable unless every byte of the file is accounted for, and OSError where it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(_LENGTH_BYTES)
        if len(prefix) < _LENGTH_BYTES:
            raise not_safetensors("it is shorter than 8 bytes")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES:
            raise not_safetensors(_recognised(prefix) or f"its header is longer than {MAX_HEADER_BYTES} bytes")
        if length > size - _LENGTH_BYTES:
            raise not_safetensors(_recognised(prefix) or "its header ends beyond the file")
        raw = file.read(length)
    _refuse_crowds(raw)
    entries = _parse(raw)
    metadata = _check_metadata(entries.pop("__metadata__", {}))
    if not entries:
        raise not_safetensors("it has no tensors")
    if len(entries) > MAX_TENSORS:
        raise not_safetensors(f"it has more than {MAX_TENSORS} tensors")
    tensors = {name: _check_tensor(name, entry) for name, entry in entries.items()}
    _check_layout(tensors.values(), size - _LENGTH_BYTES - length)
    return Header(tensors, metadata, _LENGTH_BYTES + length)


def shown(name: str) -> str:
    """A name from a file, fit for a message: ASCII, and not too long."""
    return ascii(name)[1:-1][:120]


def not_safetensors(problem: str) -> LoraUnusable:
    """What every broken container is refused with."""
    return LoraUnusable(f"The file is not a valid safetensors file: {problem}.")


def _recognised(prefix: bytes) -> str | None:
    # Asked last: every first bytes are some length, and those of gzip one that a header may have.
    return next((f"it is {kind}" for signature, kind in _SIGNATURES if signature.match(prefix)), None)


def _refuse_crowds(raw: bytes) -> None:
    # Counted before it is parsed: 4 MiB of JSON can become 100 MB of objects.
    if next(islice(_TOKEN.finditer(raw), _MAX_TOKENS, None), None) is not None:
        raise not_safetensors(f"it has more than {MAX_TENSORS} tensors, or as much of something else")


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        entries = strict_json.loads(raw)
    except strict_json.StrictJsonError as error:
        raise not_safetensors(f"its header is broken ({error})") from None
    if not isinstance(entries, dict) or not raw.startswith(b"{"):
        raise not_safetensors("its header is not a JSON object")
    return entries


def _check_metadata(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise not_safetensors("its metadata are not strings")
    return metadata


def _check_tensor(name: str, entry: Any) -> TensorInfo:
    if not name or not name.isprintable() or "/" in name or "\\" in name or ".." in name:
        raise not_safetensors("a tensor's name is empty, a path, or has control characters")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise not_safetensors(f"the tensor '{shown(name)}' is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise not_safetensors(f"the tensor '{shown(name)}' has an unknown dtype")
    if not _are_naturals(shape) or len(shape) > MAX_DIMENSIONS or 0 in shape:
        raise not_safetensors(f"the tensor '{shown(name)}' has no shape of 0 to {MAX_DIMENSIONS} positive integers")
    if not _are_naturals(offsets) or len(offsets) != 2:
        raise not_safetensors(f"the tensor '{shown(name)}' has no two offsets")
    start, end = offsets
    if end - start != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise not_safetensors(f"the tensor '{shown(name)}' has not as many bytes as its shape needs")
    return TensorInfo(dtype, tuple(shape), start, end)


def _are_naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_layout(tensors: Iterable[TensorInfo], data_bytes: int) -> None:
    position = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.start):
        if tensor.start != position:
            raise not_safetensors("its tensors overlap or leave holes")
        position = tensor.end
    if position != data_bytes:
        raise not_safetensors("its tensors do not end where the file ends")
