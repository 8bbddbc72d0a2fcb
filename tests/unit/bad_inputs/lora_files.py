"""Files that are no LoRA for SDXL, each with one thing wrong, and what the refusal says of it."""

import json
import math
import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.lora.adapter_config import MAX_CONFIG_BYTES, METADATA_KEY
from schemas.lora.header import MAX_HEADER_BYTES
from tests.lora_bytes import ACCEPTED_BY_THE_FORMAT, REFUSED_BY_THE_FORMAT, entry, framed

MODULE = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
PROMPT_MODULE = MODULE.replace("attn1.to_q", "attn2.to_k")
DOWN, UP, ALPHA = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight", f"{MODULE}.alpha"
_SIDE = 640  # the module's weight is [640, 640]

Tensor = tuple[str, list[int], bytes]


@dataclass(frozen=True, slots=True)
class BadFile:
    """`raw`, then zeros up to `size`; `said`: part of the refusal. `by_value`: only who reads the weights can tell."""

    name: str
    raw: bytes
    said: str
    size: int = 0
    by_value: bool = False

    def write(self, folder: Path) -> Path:
        """Writes the file. Of its zeros, none takes room."""
        path = folder / "lora.safetensors"
        with path.open("wb") as file:
            file.write(self.raw)
            file.truncate(max(self.size, len(self.raw)))
        return path


def file_name(file: BadFile) -> str:
    return file.name


def a_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file. A tensor: dtype, shape, bytes."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = entry(len(data), len(data) + len(raw), shape, dtype)
        data += raw
    return framed(json.dumps(header).encode(), data)


def zeros(*shape: int, dtype: str = "F32", item_bytes: int = 4) -> Tensor:
    return dtype, [*shape], bytes(math.prod(shape) * item_bytes)


def numbers(*values: float, shape: list[int] | None = None) -> Tensor:
    return "F32", [len(values)] if shape is None else shape, struct.pack(f"<{len(values)}f", *values)


def a_lora(metadata: Mapping[str, str] | None = None, **changed: Tensor | None) -> bytes:
    """A LoRA of rank 1. `changed`: `down`, `up` and `alpha`; None leaves one out."""
    tensors = {"down": zeros(1, _SIDE), "up": zeros(_SIDE, 1), "alpha": None, **changed}
    names = {"down": DOWN, "up": UP, "alpha": ALPHA}
    return a_file({names[part]: tensor for part, tensor in tensors.items() if tensor is not None}, metadata)


def beside(name: str, tensor: Tensor) -> bytes:
    """A good LoRA, and one tensor more."""
    return a_file({DOWN: zeros(1, _SIDE), UP: zeros(_SIDE, 1), name: tensor})


def configured(config: str) -> bytes:
    """A LoRA whose configuration in the metadata is `config`."""
    return a_lora({METADATA_KEY: config})


def as_header(start: bytes, again: bytes, end: bytes, length: int = MAX_HEADER_BYTES) -> bytes:
    """A file of a header alone: `again` over and over, up to `length` bytes."""
    return framed(start + again * ((length - len(start) - len(end)) // len(again)) + end)


def _with_value(at: int, value: float) -> bytes:
    return a_lora(up=numbers(*(value if place == at else 0.0 for place in range(_SIDE)), shape=[_SIDE, 1]))


def _crowd(count: int) -> bytes:
    header = ",".join(f'"{i:x}":{{"dtype":"U8","shape":[],"data_offsets":[{i},{i + 1}]}}' for i in range(count))
    return framed(b"{" + header.encode() + b"}", bytes(count))


GOOD = a_lora()

_NOT_POSITIVE, _HOLES = "no shape of 0 to 4 positive integers", "overlap or leave holes"
_NO_OBJECT, _NOT_JSON = "its header is not a JSON object", "its header is broken (not JSON"
_NO_FIELDS, _TOO_LONG = "is not described by dtype, shape and data_offsets", "its header is longer than 4194304 bytes"
_CROWDED = "more than 20000 tensors, or as much of something else"
_SAID_OF_WHAT_THE_FORMAT_REFUSES = {
    "an empty file": "shorter than 8 bytes",
    "7 bytes": "shorter than 8 bytes",
    "a header of 2^64-1 bytes": _TOO_LONG,
    "a header of 100 MB and a byte": _TOO_LONG,
    "a header beyond the end": "its header ends beyond the file",
    "no JSON": _NOT_JSON,
    "no UTF-8": "its header is broken (not UTF-8",
    "a list": _NO_OBJECT,
    "null": _NO_OBJECT,
    "a BOM": _NOT_JSON,
    "a blank before the object": _NO_OBJECT,
    "conflicting duplicates": "the same key twice",
    "an overlap": _HOLES,
    "a hole": _HOLES,
    "a hole at the start": _HOLES,
    "reversed offsets": "not as many bytes as its shape needs",
    "negative offsets": "has no two offsets",
    "three offsets": "has no two offsets",
    "trailing bytes": "do not end where the file ends",
    "a truncated file": "do not end where the file ends",
    "a shape that does not fit the bytes": "not as many bytes as its shape needs",
    "a negative shape": _NOT_POSITIVE,
    "a shape of floats": _NOT_POSITIVE,
    "a shape of strings": _NOT_POSITIVE,
    "a shape of booleans": _NOT_POSITIVE,
    "a shape that is a string": _NOT_POSITIVE,
    "a shape that overflows": "not as many bytes as its shape needs",
    "an unknown dtype": "has an unknown dtype",
    "a dtype that is a number": "has an unknown dtype",
    "an entry without a dtype": _NO_FIELDS,
    "an entry with a field too many": _NO_FIELDS,
    "an entry that is a number": _NO_FIELDS,
    "metadata that are numbers": "its metadata are not strings",
    "metadata that are a list": "its metadata are not strings",
    "deep JSON": "nested deeper than 64 levels",
    "a pickle": "it is a pickle",
    "a zip": "it is a zip, as PyTorch's own files are",
    "an HTML page": "it is a web page",
    "a gzip": "it is gzip",
    "a gzip with the time": "it is gzip",
    "an XML error page": "it is XML, as storages answer with errors",
    "an LFS pointer": "it is a Git LFS pointer",
    "5001 dimensions": _NOT_POSITIVE,
}
_PATHLIKE = "a tensor's name is empty, a path, or has control characters"
_SAID_OF_WHAT_THE_FORMAT_ACCEPTS = {
    "no tensors": "it has no tensors",
    "identical duplicates": "the same key twice",
    "tensors of no bytes that share an offset": _NOT_POSITIVE,
    "a dimension of 0 beside a huge one": _NOT_POSITIVE,
    "an empty name": _PATHLIKE,
    "a name that is a path": _PATHLIKE,
    "a name with a NUL": _PATHLIKE,
    "a name with a backslash": _PATHLIKE,
    "more tensors than any LoRA has": "it has more than 20000 tensors",
    "a header above the cap": _TOO_LONG,
}
BROKEN = [
    *(BadFile(name, REFUSED_BY_THE_FORMAT[name], said) for name, said in _SAID_OF_WHAT_THE_FORMAT_REFUSES.items()),
    BadFile("a pickle of torch's first format", pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2), "a pickle"),
    BadFile("a download that was cut in half", GOOD[: len(GOOD) // 2], "do not end where the file ends"),
    BadFile("a file twice over", GOOD + GOOD, "do not end where the file ends"),
]
ACCEPTED = [
    *(BadFile(name, ACCEPTED_BY_THE_FORMAT[name], said) for name, said in _SAID_OF_WHAT_THE_FORMAT_ACCEPTS.items()),
    BadFile("NaN at the end", _with_value(_SIDE - 1, math.nan), "has NaN or Inf", by_value=True),
    BadFile("Inf at the start", _with_value(0, -math.inf), "has NaN or Inf", by_value=True),
    BadFile("values that overflow a weight", a_lora(down=numbers(*[3e3] * _SIDE, shape=[1, _SIDE]),
            up=numbers(*[3e3] * _SIDE, shape=[_SIDE, 1])), "too large", by_value=True),
    BadFile("keys that no LoRA has", beside("extra", zeros(1)), "tensors that belong to no kind of LoRA: extra"),
    BadFile("a name that turns the text around", beside("unet.\u202emid.lora_A.weight", zeros(1)), _PATHLIKE),
    BadFile("a name of a million characters", beside("x" * 1_000_000, zeros(1)), "belong to no kind of LoRA"),
    BadFile("60k tensors in a header below the cap", _crowd(60_000), _CROWDED),
]  # fmt: skip
MEANT_FOR_OTHERS = [
    BadFile("SD 1.5", a_file({f"{PROMPT_MODULE}.lora_A.weight": zeros(1, 768),
            f"{PROMPT_MODULE}.lora_B.weight": zeros(320, 1)}), "is for SD 1.x"),
    BadFile("SD 2", a_file({f"{PROMPT_MODULE}.lora_A.weight": zeros(1, 1024),
            f"{PROMPT_MODULE}.lora_B.weight": zeros(320, 1)}), "is for SD 2.x"),
    BadFile("no LoRA keys", a_file({"emb_params": zeros(1, 768)}), "has no LoRA tensors"),
    BadFile("A without B", a_lora(up=None), "lacks its up part"),
    BadFile("B without A", a_lora(down=None), "lacks its down part"),
    BadFile("rank 0", a_lora(down=zeros(0, _SIDE), up=zeros(_SIDE, 0)), _NOT_POSITIVE),
    BadFile("rank 4096", a_lora(down=zeros(4096, _SIDE, dtype="F16", item_bytes=2),
            up=zeros(_SIDE, 4096, dtype="F16", item_bytes=2)), "rank is 4096"),
    BadFile("alpha 0", a_lora(alpha=numbers(0.0)), "alpha for unet"),
    BadFile("alpha NaN", a_lora(alpha=numbers(math.nan)), "has NaN or Inf"),
    BadFile("alpha Inf", a_lora(alpha=numbers(math.inf)), "has NaN or Inf"),
    BadFile("float64", a_lora(down=zeros(1, _SIDE, dtype="F64", item_bytes=8)), "is F64"),
    BadFile("a full checkpoint", a_file({"model.diffusion_model.input_blocks.0.0.weight": zeros(320, 4, 3, 3)}),
            "full checkpoint"),
    BadFile("an adapter of a kind that we do not know", beside(f"{MODULE}.oft_blocks", zeros(1)), "OFT"),
    BadFile("a LoRA of another width", a_lora(down=zeros(1, 320)), "does not fit the model"),
    BadFile("Flux", a_file({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": zeros(1, 1)}), "Flux"),
    BadFile("self-attention of SD 1.5", a_lora({"ss_base_model_version": "sd_v1"}), "is for SD 1.x, not for SDXL"),
    BadFile("one module under two names", a_file({DOWN: zeros(1, _SIDE), UP: zeros(_SIDE, 1),
            DOWN.removeprefix("unet."): zeros(1, _SIDE), UP.removeprefix("unet."): zeros(_SIDE, 1)}), "two LoRAs"),
]  # fmt: skip
MISCONFIGURED = [
    BadFile("a configuration that is no JSON", configured("{"), "configuration is broken"),
    BadFile("a configuration that is a list", configured("[]"), "not a JSON object"),
    BadFile("a configured alpha of 0", configured('{"lora_alpha": 0}'), "alpha for unet"),
    BadFile("a configured alpha of 1e400", configured('{"lora_alpha": 1e400}'), "configuration is broken"),
    BadFile("an alpha that overflows with its rank", a_lora({METADATA_KEY: '{"lora_alpha": 1.7e308, "use_rslora": 1}'},
            down=zeros(2, _SIDE), up=zeros(_SIDE, 2)), "an alpha that is no finite number"),
    BadFile("a pattern that takes for ever", configured('{"alpha_pattern": {"(a+)+$": 1}}'), "not a module's path"),
    BadFile("a pattern of two layers", configured('{"alpha_pattern": {"to_q|to_k": 2}}'), "is not supported"),
    BadFile("DoRA by its configuration", configured('{"use_dora": true}'), "lacks its magnitude"),
    BadFile("a configuration of over a mebibyte", configured('{"a": "' + "x" * MAX_CONFIG_BYTES + '"}'), "longer than"),
]  # fmt: skip
BIG = [
    BadFile("a header of 100 MB and a byte that is all there", struct.pack("<Q", 100_000_001), _TOO_LONG, 100_000_009),
    BadFile("a header of 2^64-1 bytes before 64 MB", struct.pack("<Q", 2**64 - 1), _TOO_LONG, 2**26),
    BadFile("a dimension of 0 beside 2^40", a_file({DOWN: ("F32", [0, 2**40], b"")}), _NOT_POSITIVE),
    BadFile("a shape of 2^40 in a file of 64 MB", a_file({DOWN: ("F32", [2**20, 2**20], b"")}), "bytes", 2**26),
    BadFile("100k tensors", _crowd(100_000), _TOO_LONG),
    BadFile("a header of lists alone", as_header(b'{"a":[', b"[],", b"[]]}"), _CROWDED),
    BadFile("a header of numbers alone", as_header(b'{"a":[', b"1.5,", b"1]}"), _CROWDED),
    BadFile("a header of names alone", as_header(b"{", b'"a":1,', b'"a":1}'), _CROWDED),
    BadFile("a header of open brackets", as_header(b'{"a":', b"[", b""), _CROWDED),
    BadFile("a header of quotes that never end", as_header(b'{"', b'\\"', b""), _NOT_JSON),
]
BAD_FILES = [*BROKEN, *ACCEPTED, *MEANT_FOR_OTHERS, *MISCONFIGURED, *BIG]
