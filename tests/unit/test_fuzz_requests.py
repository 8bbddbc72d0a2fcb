"""Whatever comes as a request is taken or refused, and what is taken can be kept, compared and sent on."""

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.entries import MAX_RUN, decode_entry
from schemas.requests import GenerationRequest, decode_request

CANARY = "c4n4ryS1gnature"
URL = f"https://account.r2.example/loras/a.safetensors?X-Amz-Signature={CANARY}"
FUZZ = settings(deadline=None, derandomize=True, max_examples=400, database=None)

VALID: dict[str, Any] = {
    "v": 1,
    "job_id": "j-1",
    "prompt": "a lighthouse",
    "negative_prompt": "fog",
    "loras": [{"url": URL, "scale": 0.5, "version": "2"}, {"key": "b.safetensors", "sha256": "0" * 64}],
    "width": 1344,
    "height": 768,
    "steps": 30,
    "cfg": 7,
    "seed": 7,
    "timeout": 30,
    "expires_at": "2036-01-01T00:00:00+02:00",
    "tenant": "ann",
    "upload_url": URL,
    "webhook_url": URL,
    "metadata": {"order": 42, "tags": ["a", None, 1.5], "夕": {}},
}
ALIEN_TEXTS = st.sampled_from(
    ["", " ", "\0", "\ud800", "\u200b", "\x1b[0m", "\u202e", "..", "/", "28", URL, f"{URL}\n"]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([-0.0, 1e308, 10**30, 2**32, 2**63, 28.0])
    | st.text(max_size=8)
    | ALIEN_TEXTS
)
NAMES = st.sampled_from([*GenerationRequest.model_fields, "url", "key", "scale", URL]) | st.text(max_size=4)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=8
)
CHANGES = st.dictionaries(NAMES, VALUES, max_size=3)
ABSENT = st.sets(st.sampled_from(sorted(VALID)), max_size=4)


def as_written(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields).encode()


def changed(absent: set[str], changes: dict[str, Any]) -> bytes:
    return as_written({name: value for name, value in VALID.items() if name not in absent} | changes)


def with_a_member_again(payload: bytes, name: str, value: Any) -> bytes:
    return payload[:-1] + b", " + json.dumps(name).encode() + b": " + json.dumps(value).encode() + b"}"


def spliced(payload: bytes, at: int, cut: int, patch: bytes) -> bytes:
    return payload[: at % len(payload)] + patch + payload[at % len(payload) + cut :]


CHANGED = st.builds(changed, ABSENT, CHANGES)
JSON = VALUES.map(lambda value: json.dumps(value).encode())
DOUBLED = st.builds(with_a_member_again, CHANGED, NAMES, VALUES)
SPLICED = st.builds(spliced, CHANGED, st.integers(0, 2000), st.integers(0, 3), st.binary(max_size=4))
IN_OTHER_CODES = st.builds(
    lambda text, code: text.decode().encode(code), CHANGED, st.sampled_from(["utf-16", "utf-32", "utf-8-sig"])
)


def look_at(entry: dict[bytes, bytes]) -> bool:
    """Checks what must hold of any entry; whether it is a request."""
    decoded = decode_entry(entry)
    assert (decoded.request is None) is (decoded.error is not None)
    assert decoded.raw == entry.get(b"payload", b"")
    assert 1 <= decoded.run <= MAX_RUN
    json.dumps(decoded.metadata, allow_nan=False, ensure_ascii=False).encode()
    if decoded.error is not None:
        assert CANARY not in f"{decoded.error} {decoded.error!r} {decoded.error.details} {decoded.job_id}"
        return False
    assert decoded.request is not None
    look_at_request(decoded.request)
    return True


def look_at_request(request: GenerationRequest) -> None:
    wire = request.encode()
    again = decode_request(wire)
    assert again == request
    assert again.encode() == wire
    assert again.fingerprint() == request.fingerprint()
    kept = request.redacted()
    assert decode_request(kept.encode()) == kept
    assert kept.fingerprint() == request.fingerprint()
    urls = [kept.lora_url, kept.upload_url, kept.webhook_url, *(lora.url for lora in kept.loras)]
    assert not any("?" in url or "#" in url for url in urls if url is not None)
    look_at_texts(request.model_dump(mode="json"))


def look_at_texts(value: Any) -> None:
    """What PostgreSQL cannot keep as text: NUL, and what is not Unicode."""
    match value:
        case str():
            assert "\0" not in value
            value.encode()
        case list():
            for item in value:
                look_at_texts(item)
        case dict():
            look_at_texts([*value, *value.values()])


def test_the_request_that_is_varied_is_a_valid_one() -> None:
    assert look_at({b"payload": as_written(VALID)})


@FUZZ
@given(st.dictionaries(st.sampled_from([b"payload", b"job_id", b"run", b"traceparent", b"x"]), st.binary(), max_size=5))
def test_an_entry_of_any_bytes_is_taken_or_refused(entry: dict[bytes, bytes]) -> None:
    """Guards `decode_entry`, which catches what `decode_request` raises, and nothing else may be raised."""
    look_at(entry)


@FUZZ
@given(JSON | IN_OTHER_CODES)
def test_any_json_is_taken_or_refused(payload: bytes) -> None:
    """Guards `strict_json.loads`: a consumer's loop has no net below it for what else is raised."""
    look_at({b"payload": payload})


@FUZZ
@given(CHANGED, st.sampled_from([{}, {b"job_id": b"j-1"}, {b"job_id": b"j-2"}, {b"run": b"7"}, {b"run": b"\xff"}]))
def test_a_request_with_other_fields_is_taken_or_refused(payload: bytes, beside: dict[bytes, bytes]) -> None:
    """Guards the rules of `schemas.fields`: what they let pass must travel, be kept, and compare equal afterwards."""
    look_at({b"payload": payload, **beside})


@FUZZ
@given(DOUBLED | SPLICED)
def test_a_request_that_was_damaged_is_taken_or_refused(payload: bytes) -> None:
    """Guards `strict_json`, beside which pydantic reads what `json` reads otherwise."""
    look_at({b"payload": payload})


@FUZZ
@given(st.sampled_from(sorted(VALID)), VALUES)
def test_a_field_that_stands_twice_is_refused(name: str, value: Any) -> None:
    """Guards `strict_json._object_of_distinct_keys`."""
    assert not look_at({b"payload": with_a_member_again(as_written(VALID), name, value)})


def test_the_variations_are_neither_all_taken_nor_all_refused() -> None:
    """Otherwise the tests above would look at one side alone."""
    taken = []

    @FUZZ
    @given(CHANGED)
    def vary(payload: bytes) -> None:
        taken.append(look_at({b"payload": payload}))

    vary()
    assert taken.count(True) > 20
    assert taken.count(False) > 20
