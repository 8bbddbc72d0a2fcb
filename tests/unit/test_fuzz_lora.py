"""Whatever a LoRA file holds, it is refused or read into finite numbers, within bounds, by both readers alike."""

import json
import math
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from consumer.errors import LoraInvalid
from consumer.lora.bounds import MAX_CHANGE
from consumer.lora.deltas import ParsedLora
from consumer.lora.formats import parse
from schemas.lora.adapter_config import METADATA_KEY, AdapterConfig
from schemas.lora.errors import LoraUnusable
from schemas.lora.header import MAX_HEADER_BYTES, read_header
from schemas.lora.plan import plan
from schemas.lora.shapes import ModelShapes
from tests.lora_bytes import framed, pair, with_tensors

MODEL = ModelShapes.of({"unet.mid": (2, 2), "unet.conv_in": (2, 2, 3, 3)}, cross_attention_dim=8)
GOOD = with_tensors({"__metadata__": {METADATA_KEY: '{"lora_alpha": 2}'}} | pair())
LONG_BYTES = MAX_HEADER_BYTES // 4
PEAK_BYTES = 16 * LONG_BYTES  # text of four bytes a letter, twice, and what the parser makes of it

fuzz = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(width=32) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
offsets = st.integers(-1, 20) | st.integers()
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(
            ["F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64", ""]
        ),
        "shape": st.lists(st.integers(-1, 4) | st.integers(), max_size=5),
        "data_offsets": st.lists(offsets, max_size=3) | st.tuples(st.just(0), st.integers(0, 64)),
    }
)
names = st.builds(
    "{}{}".format,
    st.sampled_from(["unet.mid", "unet.conv_in", "mid", "lora_unet_mid", "unet.extra", "text_encoder.x", "../x", ""]),
    st.sampled_from([".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight", ".alpha", ""])
    | st.sampled_from([".diff", ".diff_b", ".dora_scale", ".lora_mid.weight", ".lokr_w1", ".lokr_w2", ".hada_w1_a"])
    | st.text(max_size=6),
)
headers = st.dictionaries(names, entries | json_values, max_size=4)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "fuzzed.safetensors"


def read(path: Path, raw: bytes) -> ParsedLora | None:
    """What a consumer makes of the bytes, None where it refuses them. Anything that either reader raises besides fails.

    Guards what `read_header`, `plan` and `AdapterConfig` take for granted of JSON, and the `except`s around them.
    """
    path.write_bytes(raw)
    try:
        planned = plan(path, read_header(path), MODEL)
    except LoraUnusable as error:
        said = str(error)
        with pytest.raises(LoraInvalid) as refusal:
            parse(path, MODEL)
        assert (said, said.isprintable()) == (str(refusal.value), True)
        return None
    try:
        parsed = parse(path, MODEL)
    except LoraInvalid:
        return None  # for its values
    assert [(delta.module, delta.part) for delta in parsed.deltas] == [
        (delta.module, delta.part) for delta in planned.deltas
    ]
    for delta in parsed.deltas:
        change = delta.change(torch.zeros(MODEL.weights.get(delta.module, (2,)) if delta.part == "weight" else (2,)))
        assert torch.isfinite(change).all()
        assert change.abs().max() <= MAX_CHANGE
    return parsed


@fuzz
@given(raw=st.binary(max_size=300), frame=st.booleans())
def test_any_bytes_are_refused(path: Path, raw: bytes, frame: bool) -> None:
    assert read(path, framed(raw) if frame else raw) is None


@fuzz
@given(header=headers | json_values, data=st.binary(max_size=32))
def test_any_header_of_json_is_read_or_refused(path: Path, header: Any, data: bytes) -> None:
    read(path, framed(json.dumps(header).encode(), data))


@fuzz
@given(
    flips=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=4),
    end=st.integers(0, len(GOOD)) | st.just(len(GOOD)),
    more=st.binary(max_size=3),
)
def test_a_good_file_that_was_flipped_cut_or_extended_is_read_or_refused(
    path: Path, flips: list[tuple[int, int]], end: int, more: bytes
) -> None:
    raw = bytearray(GOOD)
    for place, byte in flips:
        raw[place] = byte
    parsed = read(path, bytes(raw[:end]) + more)
    assert parsed is None or end + len(more) == len(GOOD)


@fuzz
@given(numbers=st.binary(min_size=16, max_size=16))
def test_any_numbers_are_read_when_finite_and_small_and_else_refused(path: Path, numbers: bytes) -> None:
    values = struct.unpack("<4f", numbers)
    parsed = read(path, GOOD[:-16] + numbers)
    assert (parsed is not None) <= all(abs(value) < float("inf") for value in values)


OF_ONE_KIND = [
    {"lokr_w1": [1, 2], "lokr_w2": [2, 1]},
    {"lokr_w1": [2, 1], "lokr_w2_a": [1, 1], "lokr_w2_b": [1, 2]},
    {"hada_w1_a": [2, 1], "hada_w1_b": [1, 2], "hada_w2_a": [2, 1], "hada_w2_b": [1, 2]},
    {"diff": [2, 2]},
    {"lora_A.weight": [1, 2], "lora_B.weight": [2, 1], "dora_scale": [1, 2]},
    {"lora_A.weight": [1, 2], "lora_B.weight": [2, 1], "lora_magnitude_vector": [2]},
]


@fuzz
@given(kind=st.integers(0, len(OF_ONE_KIND) - 1), numbers=st.binary(min_size=32, max_size=32))
def test_any_numbers_of_any_kind_change_a_weight_within_bounds_or_are_refused(
    path: Path, kind: int, numbers: bytes
) -> None:
    """Guards `is_small`: `read` makes the change of every file that is not refused."""
    header: dict[str, Any] = {}
    place = 0
    for part, shape in OF_ONE_KIND[kind].items():
        size = 4 * math.prod(shape)
        header[f"unet.mid.{part}"] = {"dtype": "F32", "shape": shape, "data_offsets": [place, place + size]}
        place += size
    parsed = read(path, framed(json.dumps(header).encode(), numbers[:place]))
    values = struct.unpack(f"<{place // 4}f", numbers[:place])
    assert (parsed is not None) <= all(abs(value) < float("inf") for value in values)


@fuzz
@given(
    first=st.permutations([0, 8, 16]),
    second=st.permutations([0, 8, 16]),
    renamed=st.tuples(names, names),
    swap=st.booleans(),
)
def test_a_good_file_with_its_offsets_and_names_mixed_up_is_read_or_refused(
    path: Path, first: list[int], second: list[int], renamed: tuple[str, str], swap: bool
) -> None:
    down, up = pair().values()
    header = {renamed[0]: down | {"data_offsets": first[:2]}, renamed[1]: up | {"data_offsets": second[:2]}}
    raw = with_tensors(dict(reversed(header.items())) if swap else header)
    parsed = read(path, raw)
    assert parsed is None or sorted([first[:2], second[:2]]) == [[0, 8], [8, 16]]


@fuzz
@given(
    config=json_values
    | st.dictionaries(st.sampled_from(["lora_alpha", "alpha_pattern", "use_rslora", "use_dora"]), json_values)
)
def test_any_configuration_gives_a_finite_alpha_or_is_refused(config: Any) -> None:
    try:
        alpha = AdapterConfig({METADATA_KEY: json.dumps(config)}).alpha("unet.mid.to_q", 7)
    except LoraUnusable:
        return
    assert abs(alpha) < float("inf")


@settings(fuzz, max_examples=15)
@given(
    start=st.sampled_from([b"", b"{", b'{"', b'{"a":', b'{"a":[', b'{"__metadata__":{"']),
    again=st.sampled_from([b"[],", b'"",', b'{"a":', b"\\u00e9", b"\xc3\xa9", b'":"', b"1e9,", b" "])
    | st.binary(min_size=1, max_size=9),
)
@example(start=b'{"a":[', again=b"[],")
@example(start=b"{", again=b'"a":1,')
def test_a_header_of_anything_over_and_over_is_refused_within_its_memory(
    path: Path, start: bytes, again: bytes
) -> None:
    """Guards `_refuse_crowds`."""
    path.write_bytes(framed(start + again * ((LONG_BYTES - len(start)) // len(again))))
    tracemalloc.start()
    try:
        with pytest.raises(LoraUnusable):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < PEAK_BYTES
    finally:
        tracemalloc.stop()
