import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from schemas import events
from schemas.errors import ErrorCode
from schemas.events import (
    CancelledData,
    Event,
    EventError,
    FailedData,
    GenerationMetadata,
    ModelInfo,
    RetryingData,
    StartedData,
    SucceededData,
    Timings,
    decode_event,
)

AT = datetime(2026, 3, 1, 12, 30, 5, 123456, tzinfo=UTC)
SIGNED = "https://account.r2.example/loras/a.safetensors?X-Amz-Signature=0f9e8d7c6b5a"
BASE: dict[str, Any] = {"job_id": "j-1", "run": 2, "attempt": 3, "consumer": "gpu-1", "request_metadata": {"a": [1]}}
COMMON = {"job_id", "run", "attempt", "consumer", "request_metadata"}


def error_fields(**changes: Any) -> dict[str, Any]:
    return BASE | {"error": "why", "error_code": ErrorCode.LORA_DOWNLOAD_FAILED, "details": {"status": 503}} | changes


def started() -> Event:
    return events.started(StartedData(**BASE, queued=1.5), AT)


def retrying(**changes: Any) -> Event:
    return events.retrying(RetryingData(**error_fields(**changes), retry_after=2.5), AT)


def failed(**changes: Any) -> Event:
    return events.failed(FailedData(**error_fields(**changes), retry_after=60, dead_lettered=True), AT)


def cancelled() -> Event:
    return events.cancelled(CancelledData(**BASE, stage="delayed"), AT)


def succeeded() -> Event:
    data = SucceededData(
        **BASE,
        image_url=None,
        image_key="images/j-1.png",
        image_sha256="0" * 64,
        image_bytes=1_500_000,
        image_size=(1024, 768),
        generation_time_seconds=0.8,
        model_info=ModelInfo(base_model="sdxl", lora_applied=False),
        metadata=GenerationMetadata(seed_used=7, actual_steps=28, actual_cfg=5.5),
        timings=Timings(queued=1.0, prepare=0.1, generate=0.8, encode=0.1, upload=0.2, total=2.2),
        gpu="NVIDIA H200",
        gpu_seconds=0.8,
    )
    return events.succeeded(data, AT)


ALL = {"started": started, "retrying": retrying, "failed": failed, "cancelled": cancelled, "succeeded": succeeded}
every_kind = pytest.mark.parametrize("make", ALL.values(), ids=ALL)

FIELDS = {
    "started": {"queued"},
    "retrying": {"error", "error_code", "details", "retry_after"},
    "failed": {"error", "error_code", "details", "retry_after", "dead_lettered"},
    "cancelled": {"error_code", "stage"},
    "succeeded": {"image_url", "image_key", "image_sha256", "image_bytes", "image_size", "generation_time_seconds"}
    | {"model_info", "metadata", "timings", "gpu", "gpu_seconds", "warnings"},
}


@pytest.mark.parametrize("kind", list(ALL))
def test_an_event_carries_the_fields_of_the_contract(kind: str) -> None:
    payload = json.loads(ALL[kind]().encode())
    assert set(payload) == {"id", "type", "timestamp", "data"}
    assert payload["type"] == f"generation.{kind}"
    assert set(payload["data"]) == COMMON | FIELDS[kind]


def test_the_parts_of_a_success_are_those_of_the_contract() -> None:
    data = json.loads(succeeded().encode())["data"]
    assert set(data["model_info"]) == {"base_model", "lora_applied", "lora_version", "lora_scale", "loras"}
    assert set(data["metadata"]) == {"seed_used", "actual_steps", "actual_cfg"}
    assert set(data["timings"]) == {"queued", "prepare", "generate", "encode", "upload", "total"}
    assert data["image_size"] == [1024, 768]
    applied = events.AppliedLora(name="a", scale=0.5, modules=722).model_dump()
    assert set(applied) == {"name", "version", "scale", "modules", "skipped"}


@pytest.mark.parametrize(
    ("kind", "event_id"),
    [
        ("started", "j-1:2:started:3"),
        ("retrying", "j-1:2:retrying:3"),
        ("failed", "j-1:2:failed"),
        ("cancelled", "j-1:2:cancelled"),
        ("succeeded", "j-1:2:succeeded"),
    ],
)
def test_the_id_carries_the_attempt_for_what_a_run_can_have_several_of(kind: str, event_id: str) -> None:
    assert ALL[kind]().id == event_id


@pytest.mark.parametrize("kind", list(ALL))
def test_three_types_end_a_run(kind: str) -> None:
    assert events.is_terminal(f"generation.{kind}") == (kind in ("succeeded", "failed", "cancelled"))


def test_a_type_that_is_not_known_ends_no_run() -> None:
    assert not events.is_terminal("generation.paused")


@every_kind
def test_decoding_and_encoding_gives_the_same_bytes(make: Callable[[], Event]) -> None:
    raw = make().encode()
    event = decode_event(raw)
    assert type(event) is type(make())
    assert event.encode() == raw


@every_kind
def test_times_are_written_in_utc_with_milliseconds(make: Callable[[], Event]) -> None:
    assert json.loads(make().encode())["timestamp"] == "2026-03-01T12:30:05.123Z"


def test_a_time_in_another_zone_is_written_in_utc() -> None:
    at = AT.astimezone(timezone(timedelta(hours=5, minutes=30)))
    payload = json.loads(events.started(StartedData(**BASE, queued=0), at).encode())
    assert payload["timestamp"] == "2026-03-01T12:30:05.123Z"


@every_kind
def test_the_metadata_of_the_request_is_echoed_untouched(make: Callable[[], Event]) -> None:
    assert json.loads(make().encode())["data"]["request_metadata"] == {"a": [1]}


@pytest.mark.parametrize("make", [retrying, failed])
def test_errors_leave_without_the_signatures_in_them(make: Callable[..., Event]) -> None:
    raw = make(error=f"GET {SIGNED} gave 403", details={"url": SIGNED, "tried": [{"url": SIGNED}], "n": 1}).encode()
    assert b"0f9e8d7c6b5a" not in raw
    data = json.loads(raw)["data"]
    assert data["error"] == "GET https://account.r2.example/loras/a.safetensors gave 403"
    assert data["details"]["n"] == 1


def test_a_failure_says_when_to_come_back_in_whole_seconds_or_never() -> None:
    for retry_after in (None, 0, 60):
        data = FailedData(**error_fields(), retry_after=retry_after, dead_lettered=retry_after is not None)
        assert json.loads(events.failed(data, AT).encode())["data"]["retry_after"] == retry_after
    with pytest.raises(ValidationError):
        FailedData(**error_fields(), retry_after=1.5, dead_lettered=True)


@pytest.mark.parametrize("stage", ["queued", "delayed", "preparing", "running"])
def test_a_cancellation_says_where_the_job_was(stage: Any) -> None:
    data = json.loads(events.cancelled(CancelledData(**BASE, stage=stage), AT).encode())["data"]
    assert (data["error_code"], data["stage"]) == ("CANCELLED", stage)


def test_a_cancellation_knows_no_other_stage_and_no_other_code() -> None:
    with pytest.raises(ValidationError):
        CancelledData(**BASE, stage="delivering")
    with pytest.raises(ValidationError):
        CancelledData(**BASE, stage="queued", error_code=ErrorCode.INTERNAL)


@every_kind
def test_what_a_newer_consumer_adds_is_passed_over(make: Callable[[], Event]) -> None:
    payload = json.loads(make().encode())
    payload["trace"] = "new"
    payload["data"] |= {"cost": 1, "job": {"new": True}}
    assert decode_event(json.dumps(payload).encode()) == decode_event(make().encode())


def changed(**changes: Any) -> bytes:
    return json.dumps(json.loads(failed().encode()) | changes).encode()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        b'"generation.failed"',
        changed(type="generation.paused"),
        changed(type=None),
        changed(data={}),
        changed(data=None),
        changed(timestamp="yesterday"),
        changed(id=7),
        changed(data=json.loads(failed().encode())["data"] | {"error_code": "NO_SUCH_CODE"}),
        b'{"type":' * 3000,
    ],
    ids=lambda raw: repr(raw)[:40],
)
def test_bytes_that_are_no_event_are_refused(raw: bytes) -> None:
    with pytest.raises(EventError):
        decode_event(raw)


@settings(deadline=None)
@given(st.binary() | st.dictionaries(st.text(), st.text()).map(lambda value: json.dumps(value).encode()))
def test_decoding_arbitrary_bytes_raises_nothing_else(raw: bytes) -> None:
    with pytest.raises(EventError):
        decode_event(raw)


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(["type", "id", "timestamp", "data", "more"]), st.sampled_from([SIGNED, [SIGNED], {SIGNED: SIGNED}])
)
def test_a_refusal_does_not_repeat_the_input(field: str, planted: Any) -> None:
    payload = {"type": "generation.failed", "data": {SIGNED: 1}} | {field: planted}
    with pytest.raises(EventError) as refusal:
        decode_event(json.dumps(payload).encode())
    assert not re.search("0f9e8d|r2.example", repr(refusal.value))


def test_errors_of_data_made_in_python_do_not_repeat_the_input() -> None:
    with pytest.raises(ValidationError) as refusal:
        StartedData(**BASE | {"run": SIGNED}, queued=SIGNED)
    assert "r2.example" not in f"{refusal.value} {refusal.value!r}"


def test_an_event_cannot_be_changed() -> None:
    event = started()
    with pytest.raises(ValidationError, match="frozen"):
        event.__setattr__("id", "other")
