"""Files that are no LoRA, or barely one, as bytes: by what is wrong with them."""

import gzip
import io
import json
import pickle
import struct
import zipfile
from typing import Any

from schemas.lora.header import MAX_HEADER_BYTES, MAX_TENSORS

DOWN = "unet.mid.lora_A.weight"
UP = "unet.mid.lora_B.weight"


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
    "a gzip": gzip.compress(b"x" * 100, mtime=0),
    "a gzip with the time": gzip.compress(b"x" * 100, mtime=1_700_000_000),
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
