"""Entries whose envelope or whose JSON is wrong."""

import json
from collections.abc import Mapping
from typing import Any

from tests.unit.bad_inputs.kit import FINE, JOB_ID, REFUSED, SIGNED, Case, Outcome, payload, payload_with


def _raw(name: str, raw: bytes, *, named: bool, outcome: Outcome | None = REFUSED) -> Case:
    return Case(name, {b"payload": raw}, outcome, named)


def _entry(name: str, *, named: bool = True, **entry: bytes) -> Case:
    return Case(name, {field.encode(): value for field, value in entry.items()}, REFUSED, named)


def _request(name: str, fields: Mapping[str, Any], *, named: bool = True, outcome: Outcome | None = REFUSED) -> Case:
    """What can be given to the client too."""
    given = {"job_id": JOB_ID, "prompt": "a lighthouse", "webhook_url": SIGNED, **fields}
    return Case(name, {b"payload": json.dumps(given).encode()}, outcome, named, fields=given)


def _nested(depth: int) -> bytes:
    return payload_with(b'"metadata": ' + b'{"a": ' * depth + b"1" + b"}" * depth)


def _without(field: str) -> bytes:
    return json.dumps({name: value for name, value in json.loads(payload()).items() if name != field}).encode()


_TWICE = b'{"job_id": "the-job", "job_id": "other", "prompt": "a"}'

CATALOGUE = [
    _raw("an empty map", b"{}", named=False),
    _entry("no payload", named=False, data=payload()),
    _raw("not UTF-8", payload(prompt="CAF").replace(b"CAF", b"caf\xe9"), named=False),
    _raw("a byte order mark", b"\xef\xbb\xbf" + payload(), named=False),
    _raw("trailing bytes", payload() + b"x", named=False),
    _raw("an array", b"[" + payload() + b"]", named=False),
    _raw("null", b"null", named=False),
    _raw("a string", json.dumps(payload().decode()).encode(), named=False),
    _raw("300 levels", _nested(300), named=True),
    _raw("5000 levels", _nested(5000), named=False),
    _raw("a duplicate key", payload_with('"prompt": "another"'), named=True),
    _raw("a lone surrogate", payload_with('"tenant": "\\ud800"'), named=True),
    _request("a NUL character", {"tenant": "a\0b"}),
    _request("NaN", {"cfg": float("nan")}),
    _request("Infinity", {"cfg": float("inf")}),
    _raw("1e400", payload_with('"cfg": 1e400'), named=True),
    _raw("a number of 5000 digits", payload_with('"seed": ' + "9" * 5000), named=True),
    _request("10^30", {"seed": 10**30}),
    _request("an unknown field", {"stepz": 28}),
    _request("no version", {}, outcome=FINE),
    _request("a version from the future", {"v": 2}),
    _request("1 MiB", {"prompt": "x" * 2**20}),
    _request("a job id with a dot", {"job_id": "the.job"}, named=False),
    _request("a job id with a newline", {"job_id": "the-job\n"}, named=False),
]

MORE = [
    _entry("an empty payload", payload=b"", named=False),
    _raw("a raw NUL", payload().replace(b"light", b"light\0"), named=False),
    _raw("a raw newline in a string", payload().replace(b"light", b"light\n"), named=False),
    _raw("a surrogate in UTF-8", payload().replace(b"light", b"\xed\xa0\x80"), named=False),
    _raw("an overlong slash in UTF-8", payload().replace(b"light", b"\xc0\xaf"), named=False),
    _raw("UTF-16", payload().decode().encode("utf-16"), named=False),
    _raw("cut off", payload()[:-1], named=False),
    _raw("two values", payload() + payload(), named=False),
    _raw("a trailing comma", payload()[:-1] + b",}", named=False),
    _raw("a comment", payload() + b" // a comment", named=False),
    _raw("single quotes", b"{'job_id': 'the-job', 'prompt': 'a'}", named=False),
    _raw("a literal", b"true", named=False),
    _raw("a number", b"7", named=False),
    _raw("100000 brackets", b"[" * 100_000, named=False),
    _raw("3 MiB", payload() + b" " * 3 * 2**20, named=False),
    _raw("64 KiB and a byte", payload() + b" " * (2**16 + 1 - len(payload())), named=True),
    _raw("64 KiB", payload() + b" " * (2**16 - len(payload())), named=True, outcome=FINE),
    _raw("-Infinity", payload_with('"cfg": -Infinity'), named=True),
    _raw("-1e400", payload_with('"metadata": {"a": -1e400}'), named=True),
    _raw("a leading zero", payload_with('"seed": 01'), named=False),
    _raw("a plus sign", payload_with('"seed": +1'), named=False),
    _raw("a hexadecimal number", payload_with('"seed": 0x1'), named=False),
    _raw("a duplicate key in metadata", payload_with('"metadata": {"a": {"b": 1, "b": 1}}'), named=True),
    _raw("a duplicate key that is escaped", payload_with('"seed": 1, "\\u0073eed": 2'), named=True),
    _raw("a duplicate key in a LoRA", payload_with('"loras": [{"key": "a", "key": "b"}]'), named=True),
    _raw("a duplicate job id", _TWICE, named=False),
    _raw("half a pair as a metadata key", payload_with('"metadata": {"\\udc00": 1}'), named=True),
    _raw("half a pair before a letter", payload_with('"metadata": {"a": "\\ud83dx"}'), named=True),
    _raw("a pair in metadata", payload_with('"metadata": {"\\ud83d\\ude00": 1}'), named=True, outcome=FINE),
    _raw("63 levels of metadata", _nested(63), named=True, outcome=FINE),
    _raw("64 levels of metadata", _nested(64), named=True),
    _raw("a NUL as a field", payload_with('"a\\u0000": 1'), named=True),
    _request("a NUL as a metadata key", {"metadata": {"a\0": 1}}),
    _request("a version as text", {"v": "1"}),
    _request("a version that is null", {"v": None}),
    _request("version 1", {"v": 1}, outcome=FINE),
    _request("version 0", {"v": 0}),
    _request("a job id of 65 characters", {"job_id": "a" * 65}, named=False),
    _request("a job id with a slash", {"job_id": "the/job"}, named=False),
    _request("a job id in another script", {"job_id": "обед"}, named=False),
    _request("an empty job id", {"job_id": ""}, named=False),
    _request("a job id that is a number", {"job_id": 7}, named=False),
    _raw("no job id", _without("job_id"), named=False),
    _raw("no prompt", _without("prompt"), named=True),
    _entry("another job id beside the payload", payload=payload(job_id="another"), job_id=JOB_ID.encode()),
    _entry("a bad job id beside the payload", payload=payload(), job_id=b"the.job"),
    _entry("a job id that is not UTF-8 beside the payload", payload=payload(), job_id=b"\xff"),
    _entry("run 0", payload=payload(), run=b"0"),
    _entry("run -1", payload=payload(), run=b"-1"),
    _entry("run 1.0", payload=payload(), run=b"1.0"),
    _entry("an empty run", payload=payload(), run=b""),
    _entry("a run in other digits", payload=payload(), run="١".encode()),
    _entry("run 2^31", payload=payload(), run=b"2147483648"),
    _entry("a run of 5000 digits", payload=payload(), run=b"9" * 5000),
]

ENVELOPES = CATALOGUE + MORE
