import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import strict_json
from schemas.strict_json import StrictJsonError

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"{} {}", "not JSON: Extra data"),
        (b'{"a": 1,}', "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": "\x00"}', "control character"),
        (b'{"a": 1, "a": 1}', "same key twice"),
        (b'{"a": {"b": 1, "b": 2}}', "same key twice"),
        (b'{"a": 1, "\\u0061": 2}', "same key twice"),
        (b'{"a": NaN}', "NaN"),
        (b"[Infinity]", "Infinity"),
        (b"[-Infinity]", "-Infinity"),
        (b"[1e400]", "out of range"),
        (b"[-1e400]", "out of range"),
        (b"[" + b"9" * 5000 + b"]", "too many digits"),
        (b'["\\ud800"]', "lone surrogate"),
        (b'{"\\udfff": 1}', "lone surrogate"),
        (b"[" * 65 + b"]" * 65, "nested deeper than 64"),
        (b"[" * 300 + b"]" * 300, "nested deeper than 64"),
        (b"[" * 5000 + b"]" * 5000, "nested deeper than 64"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "nested deeper than 64"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_not_exactly_one_well_formed_value_is_refused(raw: bytes, reason: str) -> None:
    with pytest.raises(StrictJsonError, match=reason):
        strict_json.loads(raw)


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b" \n{} \n", {}),
        (b"[" * 64 + b"]" * 64, None),
        (b'["\\ud83d\\ude00"]', ["\N{GRINNING FACE}"]),
        (b"[1e308, 5e-324, 1e-400]", [1e308, 5e-324, 0.0]),
        (b'[{"a": 1}, {"a": 1}]', [{"a": 1}, {"a": 1}]),
        (b"9" * 4000, int("9" * 4000)),
        (b'"\\u0000"', "\0"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_unusual_but_well_formed_is_read(raw: bytes, value: Any) -> None:
    assert strict_json.loads(raw) == (value if value is not None else json.loads(raw))


@settings(deadline=None)
@given(JSON_VALUES)
def test_it_reads_what_json_writes(value: Any) -> None:
    assert strict_json.loads(json.dumps(value).encode()) == value


@settings(deadline=None)
@given(st.binary() | st.text().map(str.encode) | JSON_VALUES.map(lambda value: json.dumps(value).encode()[:-1]))
def test_arbitrary_bytes_are_read_or_refused_and_never_raise_anything_else(raw: bytes) -> None:
    try:
        value = strict_json.loads(raw)
    except StrictJsonError:
        return
    strict_json.check(value)


@pytest.mark.parametrize("planted", [b'{"a": s3cret}', b'{"s3cret": 1, "s3cret": 1}', b'"\\ud800s3cret', b"s3cret"])
def test_a_refusal_does_not_repeat_the_input(planted: bytes) -> None:
    with pytest.raises(StrictJsonError) as refusal:
        strict_json.loads(planted)
    assert "s3cret" not in str(refusal.value)


@pytest.mark.parametrize(
    ("value", "depth", "reason"),
    [
        (float("nan"), 0, "out of range"),
        ({"a": [float("-inf")]}, 9, "out of range"),
        (["\ud800"], 9, "lone surrogate"),
        ([[]], 1, "nested deeper"),
        ({}, 0, "nested deeper"),
    ],
)
def test_values_made_in_python_are_held_to_the_same_rules(value: Any, depth: int, reason: str) -> None:
    with pytest.raises(StrictJsonError, match=reason):
        strict_json.check(value, depth)


def test_levels_are_counted_as_documented() -> None:
    strict_json.check([[]], 2)
    strict_json.check({"a": {"b": "c"}}, 2)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"job_id": "j-1"}',
        b'{"job_id": "j-1", "job": NaN}',
        b'{"job_id": "j-1", "a": 1, "a": 2}',
        b'{"job_id": "j-1", "a": {"job_id": "other"}}',
        b'{"a": {"job_id": "other"}, "job_id": "j-1"}',
        b'{"job_id": "j-1", "a": ' + b"9" * 5000 + b"}",
        b'{"job_id": "j-1", "a": "\\ud800"}',
        b'{"job_id": "j-1", "a": 1e400}',
    ],
    ids=lambda raw: repr(raw)[:40],
)
def test_a_job_id_is_salvaged_from_json_that_is_refused_for_another_reason(raw: bytes) -> None:
    assert strict_json.salvage_string(raw, "job_id") == "j-1"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff",
        b"j-1",
        b'"j-1"',
        b"null",
        b'[{"job_id": "j-1"}]',
        b'{"job_id": 1}',
        b'{"job_id": null}',
        b'{"job_id": "j-1", "job_id": "j-2"}',
        b'{"job_id": "j-1", "job_id": "j-1"}',
        b'{"a": {"job_id": "j-1"}}',
        b'{"job_id": "j-1"',
        b'{"job_id":' * 5000,
        b'{"a":' * 5000 + b'"job_id"' + b"}" * 5000,
    ],
    ids=lambda raw: repr(raw)[:40],
)
def test_nothing_is_salvaged_where_there_is_no_single_top_level_string(raw: bytes) -> None:
    assert strict_json.salvage_string(raw, "job_id") is None


@settings(deadline=None)
@given(st.binary())
def test_salvaging_never_raises(raw: bytes) -> None:
    strict_json.salvage_string(raw, "job_id")
