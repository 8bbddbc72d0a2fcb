import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from schemas.entries import MAX_RUN, MAX_SALVAGED_BYTES, decode_entry
from schemas.errors import ErrorCode
from schemas.requests import GenerationRequest

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
SECRET = "https://r2.example/a?X-Amz-Signature=0f9e8d7c6b5a"


def body(**fields: Any) -> bytes:
    return json.dumps({"job_id": "j-1", "prompt": "a lighthouse"} | fields).encode()


def nested(depth: int) -> bytes:
    return b'{"job_id":"j-1","prompt":"a","metadata":' + b'{"a":' * depth + b"1" + b"}" * (depth + 1)


def test_a_bare_payload_is_as_good_as_an_entry_of_the_client() -> None:
    bare = decode_entry({b"payload": body()})
    full = decode_entry({b"payload": body(), b"job_id": b"j-1", b"run": b"1"})
    assert bare == full
    assert (bare.job_id, bare.run, bare.error, bare.traceparent, bare.raw) == ("j-1", 1, None, None, body())
    assert bare.request == GenerationRequest(job_id="j-1", prompt="a lighthouse")


def test_fields_that_are_not_known_are_passed_over() -> None:
    assert decode_entry({b"payload": body(), b"more": b"\xff"}).error is None


@pytest.mark.parametrize(("run", "traceparent"), [(1, None), (7, TRACEPARENT), (MAX_RUN, None)])
def test_an_entry_says_after_decoding_what_was_encoded(run: int, traceparent: str | None) -> None:
    request = GenerationRequest(job_id="j-1", prompt="a", lora_url=SECRET, metadata={"夕": [None, 1.5]})
    fields = {b"payload": request.encode(), b"job_id": request.job_id.encode(), b"run": str(run).encode()}
    if traceparent is not None:
        fields[b"traceparent"] = traceparent.encode()
    entry = decode_entry(fields)
    assert (entry.request, entry.run, entry.traceparent, entry.error) == (request, run, traceparent, None)
    assert entry.raw == request.encode()


# What an envelope can be, from the catalogue of faults: the payload, and the job id that its event goes to.
@pytest.mark.parametrize(
    ("raw", "job_id"),
    [
        (b"", None),
        (b"\xff\xfe\x00", None),
        (body(prompt="\xe9").replace(b"\\u00e9", b"\xe9"), None),
        (b"\xef\xbb\xbf" + body(), None),
        (body() + b"x", None),
        (body() + body(), None),
        (b"[" + body() + b"]", None),
        (b"null", None),
        (b'"j-1"', None),
        (b"1", None),
        (nested(300), "j-1"),
        (nested(5000), None),
        (b'{"job_id":"j-1","prompt":"a","prompt":"b"}', "j-1"),
        (b'{"job_id":"j-1","job_id":"j-2","prompt":"a"}', None),
        (b'{"job_id":"j-1","prompt":"\\ud800"}', "j-1"),
        (body(tenant="a\0"), "j-1"),
        (b'{"job_id":"j-1","prompt":"a\0"}', None),
        (b'{"job_id":"j-1","prompt":"a","cfg":NaN}', "j-1"),
        (b'{"job_id":"j-1","prompt":"a","cfg":Infinity}', "j-1"),
        (b'{"job_id":"j-1","prompt":"a","cfg":1e400}', "j-1"),
        (b'{"job_id":"j-1","prompt":"a","metadata":{"a":1e400}}', "j-1"),
        (b'{"job_id":"j-1","prompt":"a","seed":' + b"9" * 5000 + b"}", "j-1"),
        (body(seed=10**30), "j-1"),
        (body(unknown=1), "j-1"),
        (body(v=2), "j-1"),
        (body(prompt="x" * 2**20), "j-1"),
        (b" " * 2**20 + body(), "j-1"),
        (body(job_id="j.1"), None),
        (body(job_id="j-1\n"), None),
        (body(job_id=7), None),
        (b'{"job_id":7}', None),
        (b'{"prompt":"a"}', None),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_an_envelope_outside_the_contract_is_refused(raw: bytes, job_id: str | None) -> None:
    entry = decode_entry({b"payload": raw})
    assert entry.request is None
    assert entry.error is not None
    assert entry.error.code is ErrorCode.INVALID_REQUEST
    assert (entry.job_id, entry.run, entry.raw) == (job_id, 1, raw)


@pytest.mark.parametrize("raw", [b"", b"\xff", b"null", nested(5000), b'{"job_id":7}'], ids=lambda raw: repr(raw)[:40])
def test_the_job_id_beside_an_unreadable_payload_names_the_job(raw: bytes) -> None:
    entry = decode_entry({b"payload": raw, b"job_id": b"j-9", b"run": b"4"})
    assert (entry.job_id, entry.run, entry.request) == ("j-9", 4, None)
    assert entry.error is not None


@pytest.mark.parametrize(
    "fields", [{}, {b"job_id": b"j-1"}, {b"Payload": body(), b"job_id": b"j-1"}, {b"data": body()}]
)
def test_an_entry_without_a_payload_is_refused(fields: dict[bytes, bytes]) -> None:
    entry = decode_entry(fields)
    assert entry.error is not None
    assert (entry.request, entry.raw, entry.job_id) == (None, b"", fields.get(b"job_id", b"").decode() or None)


def test_a_version_that_is_missing_is_version_1() -> None:
    request = decode_entry({b"payload": body()}).request
    assert request is not None
    assert request.v == 1


def test_a_bad_prompt_keeps_its_own_code() -> None:
    entry = decode_entry({b"payload": body(prompt="\u200b")})
    assert entry.error is not None
    assert (entry.error.code, entry.job_id) == (ErrorCode.INVALID_PROMPT, "j-1")


def test_two_bodies_under_one_id_both_decode_and_differ_by_fingerprint() -> None:
    # Which of them owns the run is decided by the queue.
    first, second = (decode_entry({b"payload": body(seed=seed)}).request for seed in (1, 2))
    assert first is not None
    assert second is not None
    assert first.fingerprint() != second.fingerprint()


def test_an_entry_that_names_another_job_than_its_payload_is_refused_for_the_job_that_it_names() -> None:
    entry = decode_entry({b"payload": body(), b"job_id": b"j-2"})
    assert entry.error is not None
    assert (entry.job_id, entry.request) == ("j-2", None)


@pytest.mark.parametrize("named", [b"", b"j.1", b"j-1\n", b"\xff", b"a" * 65])
def test_an_entry_with_a_bad_job_id_is_refused_for_the_job_of_its_payload(named: bytes) -> None:
    entry = decode_entry({b"payload": body(), b"job_id": named})
    assert entry.error is not None
    assert (entry.job_id, entry.request) == ("j-1", None)


@pytest.mark.parametrize(
    "run", [b"", b"0", b"-1", b"+1", b"1.0", b" 1", b"1_0", b"one", b"\xff", b"2147483648", b"9" * 5000]
)
def test_a_run_that_is_no_positive_integer_is_refused(run: bytes) -> None:
    entry = decode_entry({b"payload": body(), b"job_id": b"j-1", b"run": run})
    assert entry.error is not None
    assert (entry.error.code, entry.job_id, entry.run) == (ErrorCode.INVALID_REQUEST, "j-1", 1)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"00",
        TRACEPARENT.encode() + b"\n",
        TRACEPARENT.upper().encode(),
        b"ff" + TRACEPARENT[2:].encode(),
        b"00-" + b"0" * 32 + TRACEPARENT[35:].encode(),
        TRACEPARENT[:36].encode() + b"0" * 16 + b"-01",
        b"\xff" * 55,
        SECRET.encode(),
        b"0" * 2**20,
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_broken_traceparent_is_ignored_and_refuses_nothing(value: bytes) -> None:
    entry = decode_entry({b"payload": body(), b"traceparent": value})
    assert (entry.traceparent, entry.error) == (None, None)


@pytest.mark.parametrize("payload", [body(), b"\xff"])
def test_a_traceparent_is_kept_even_where_the_payload_is_refused(payload: bytes) -> None:
    assert decode_entry({b"payload": payload, b"traceparent": TRACEPARENT.encode()}).traceparent == TRACEPARENT


NEARLY = st.fixed_dictionaries(
    {"job_id": st.sampled_from(["j-1", "", SECRET, 7]), "prompt": st.sampled_from(["a", "", SECRET, "\ud800", None])},
    optional={
        "lora_url": st.sampled_from([SECRET, f" {SECRET}", SECRET.replace("//", "//user@"), "https://[::1"]),
        "expires_at": st.sampled_from([SECRET, "2026-03-01T12:00:00Z", "9999-12-31T23:59:59-01:00"]),
        "metadata": st.sampled_from([{SECRET: SECRET}, [SECRET], {"a": float("nan")}, {}]),
        "loras": st.sampled_from([[{"url": SECRET}], [{SECRET: 1}], [{"key": SECRET, "scale": SECRET}], SECRET]),
        SECRET: st.sampled_from([1, SECRET]),
    },
).map(lambda value: json.dumps(value).encode())
ALMOST_JSON = st.tuples(NEARLY, st.integers(0, 60), st.binary(max_size=3)).map(
    lambda t: t[0][: t[1]] + t[2] + t[0][t[1] :]
)
PAYLOADS = st.binary(max_size=60) | NEARLY | ALMOST_JSON
NAMES = st.sampled_from([b"payload", b"job_id", b"run", b"traceparent"]) | st.binary(max_size=8)


@settings(deadline=None, max_examples=400)
@given(
    st.dictionaries(NAMES, st.binary(max_size=30) | st.just(SECRET.encode()), max_size=4),
    st.one_of(st.none(), PAYLOADS),
)
@example({}, body(expires_at="0001-01-01T00:00:00+01:00"))
@example({b"run": SECRET.encode(), b"job_id": SECRET.encode()}, body())
def test_whatever_is_in_an_entry_it_is_decoded_or_refused_without_repeating_it(
    fields: dict[bytes, bytes], payload: bytes | None
) -> None:
    if payload is not None:
        fields = fields | {b"payload": payload}
    entry = decode_entry(fields)
    assert (entry.request is None) == (entry.error is not None)
    assert entry.raw == fields.get(b"payload", b"")
    assert 1 <= entry.run <= MAX_RUN
    if entry.request is not None:
        assert entry.job_id == entry.request.job_id
        assert decode_entry({b"payload": entry.request.encode()}).request == entry.request
    if entry.error is not None:
        text = f"{entry.error} {entry.error!r} {entry.error.details} {entry.job_id} {entry.traceparent}"
        assert "r2.example" not in text
        assert "0f9e8d7c6b5a" not in text


@pytest.mark.parametrize(
    ("payload", "echo"),
    [
        (b'{"job_id":"a","prompt":"p","zzz":1,"metadata":{"order":42}}', {"order": 42}),
        (b'{"job_id":"a","prompt":" ","metadata":{"order":42}}', {"order": 42}),
        (b'{"job_id":"a","metadata":"none"}', {}),
        (b'{"job_id":"a","metadata":{"a":"\\u0000"}}', {}),
        (b'{"job_id":"a","metadata":{"a":1,"a":2}}', {}),
        (b"[]", {}),
        (b"\xff", {}),
    ],
)
def test_what_is_refused_for_something_else_echoes_its_metadata(payload: bytes, echo: dict[str, int]) -> None:
    entry = decode_entry({b"payload": payload})
    assert entry.error is not None
    assert entry.metadata == echo


def test_a_payload_of_absurd_size_is_not_searched_for_an_id() -> None:
    payload = b'{"job_id":"a","prompt":"' + b"x" * MAX_SALVAGED_BYTES + b'"}'
    assert decode_entry({b"payload": payload}).job_id is None
    assert decode_entry({b"payload": payload, b"job_id": b"a"}).job_id == "a"
