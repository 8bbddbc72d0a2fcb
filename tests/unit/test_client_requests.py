"""What callers give becomes a request that fits the contract, or is refused as a consumer would refuse it."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from producer.errors import RequestRefused
from producer.requests import RequestChanges, RequestFields, check, follow_up, make_request, own_url_expired, presigned
from producer.storage import PresignedUrls
from schemas.errors import ErrorCode
from schemas.fields import is_job_id
from schemas.requests import GenerationRequest, LoraRef
from tests import event_kit

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SECRET = "X-Amz-Signature=canary"


def test_the_keyword_arguments_are_exactly_the_fields_of_the_contract() -> None:
    assert set(get_type_hints(RequestFields)) == set(GenerationRequest.model_fields)
    assert set(GenerationRequest.model_fields) - set(get_type_hints(RequestChanges)) == {"job_id"}


def test_a_request_without_an_id_gets_a_new_one() -> None:
    one, other = make_request({"prompt": "a fox"}), make_request({"prompt": "a fox", "job_id": None})
    assert is_job_id(one.job_id)
    assert one.job_id != other.job_id


def test_what_python_has_for_lists_times_and_loras_is_taken() -> None:
    loras = [LoraRef(key="a.safetensors", scale=0.5), {"key": "b.safetensors"}]
    request = make_request({"prompt": "a fox", "loras": loras, "expires_at": NOW, "metadata": {"tags": ("a", "b")}})
    assert [lora.key for lora in request.loras] == ["a.safetensors", "b.safetensors"]
    assert request.expires_at == NOW
    assert request.metadata == {"tags": ["a", "b"]}


@pytest.mark.parametrize(
    "fields",
    [
        {"job_id": ""},
        {"job_id": 7},
        {"steps": "28"},
        {"steps": 28.0},
        {"cfg": float("nan")},
        {"expires_at": datetime(2026, 1, 2)},
        {"metadata": {"x": object()}},
        {"metadata": {"x": "y" * 5000}},
        {"metadata": {"x": b"\xff"}},
        {"prompt": "\ud800"},
        {"lora_url": f"http:///?{SECRET}"},
        {"lora_url": "https://x.example/a", "lora_key": "a"},
        {"v": 2},
        {"loras": [{}]},
        {"loras": "abc"},
    ],
)
def test_what_a_consumer_would_refuse_is_refused_here(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestRefused) as caught:
        make_request({"job_id": "job-1", "prompt": "a fox", **fields})
    assert caught.value.error_code == ErrorCode.INVALID_REQUEST
    assert caught.value.job_id in ("job-1", None)
    assert "canary" not in f"{caught.value} {caught.value.details}"


def test_a_request_that_was_made_past_its_checks_is_checked_again() -> None:
    request = GenerationRequest(job_id="job-1", prompt="a fox").model_copy(update={"steps": 5, "prompt": ""})
    with pytest.raises(RequestRefused) as caught:
        make_request(request)
    assert {problem["field"] for problem in caught.value.details["problems"]} == {"steps", "prompt"}


def test_a_circle_is_refused_and_not_followed() -> None:
    circle: dict[str, Any] = {}
    circle["x"] = circle
    with pytest.raises(RequestRefused):
        make_request({"prompt": "a fox", "metadata": circle})
    with pytest.raises(RequestRefused):
        make_request({"prompt": "a fox", "metadata": {"file": Path}})


def test_a_url_that_still_has_its_query_is_kept() -> None:
    payload = GenerationRequest(job_id="job-1", prompt="a fox", lora_url=f"https://x.example/a?{SECRET}").encode()
    assert follow_up(payload, {}, None, NOW).lora_url == f"https://x.example/a?{SECRET}"


@pytest.mark.parametrize(
    "changes",
    [{"lora_url": None}, {"lora_key": "b"}, {"loras": [{"key": "b"}]}, {"lora_url": "https://x.example/b"}],
)
def test_a_change_of_the_lora_replaces_however_it_was_written(changes: dict[str, Any]) -> None:
    for fields in ({"lora_url": "https://x.example/a"}, {"loras": [{"url": "https://x.example/a"}]}):
        payload = make_request({"job_id": "job-1", "prompt": "a fox", **fields}).encode()
        expected = make_request({"job_id": "job-1", "prompt": "a fox", **changes})
        assert follow_up(payload, changes, None, NOW) == expected


def test_a_change_of_where_the_picture_goes_replaces_however_it_was_written() -> None:
    payload = make_request({"job_id": "job-1", "prompt": "a fox", "upload_url": "https://x.example/a"}).encode()
    request = follow_up(payload, {"output_key": "a.png"}, None, NOW)
    assert (request.upload_url, request.output_key) == (None, "a.png")


@pytest.mark.parametrize("payload", [b"", b"\xff", b"[]", b"null", b'{"a":1,"a":2}'])
def test_a_last_request_that_is_none_asks_for_a_whole_one(payload: bytes) -> None:
    with pytest.raises(RequestRefused, match="whole request"):
        follow_up(payload, {"prompt": "a fox"}, None, NOW)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('"lora_url": 7', "lora_url"),
        ('"loras": [7]', "loras"),
        ('"loras": [{"url": 7}]', "loras"),
        ('"loras": 7', "loras"),
    ],
)
def test_a_last_request_that_never_fitted_is_refused_for_what_is_wrong_with_it(body: str, problem: str) -> None:
    with pytest.raises(RequestRefused, match=problem):
        follow_up(f'{{"job_id": "job-1", "prompt": "a fox", {body}}}'.encode(), {}, None, NOW)


def test_a_time_limit_is_compared_with_the_given_time() -> None:
    payload = make_request({"prompt": "a fox", "expires_at": NOW}).encode()
    assert follow_up(payload, {}, None, NOW - timedelta(seconds=1)).expires_at == NOW
    with pytest.raises(RequestRefused, match="expires_at"):
        follow_up(payload, {}, None, NOW)


STORAGE = PresignedUrls(
    endpoint_url="https://account.r2.example", bucket="pictures", access_key_id="id", secret_access_key="secret"
)
OWN_URL = "https://account.r2.example/pictures/a.safetensors"


def test_a_key_is_signed_at_each_call_and_nothing_else_changes() -> None:
    request = make_request(
        {"job_id": "j", "prompt": "a fox", "lora_key": "a b", "expires_at": NOW, "metadata": {"x": 1}}
    )
    signed = presigned(request, STORAGE)
    assert STORAGE.owns(signed.lora_url or "") == "a b"
    assert signed.model_copy(update={"lora_url": None, "lora_key": "a b"}) == request
    assert signed.fingerprint() == presigned(request, STORAGE).fingerprint() != request.fingerprint()


@pytest.mark.parametrize("storage", [STORAGE, None])
def test_a_request_without_a_key_needs_no_signing(storage: PresignedUrls | None) -> None:
    for fields in ({}, {"lora_url": "https://x.example/a?s=1"}, {"loras": [{"url": "https://x.example/a"}]}):
        request = make_request({"prompt": "a fox", **fields})
        assert presigned(request, storage) is request


def test_a_key_beside_the_url_of_the_same_object_is_the_same_lora_twice() -> None:
    request = make_request({"prompt": "a fox", "loras": [{"key": "a.safetensors"}, {"url": OWN_URL}]})
    with pytest.raises(RequestRefused, match="same LoRA twice"):
        presigned(request, STORAGE)


def test_each_request_is_checked_for_itself() -> None:
    sources = [{"job_id": "a", "prompt": "a fox"}, {"prompt": ""}, {"job_id": "b", "prompt": "a fox", "lora_key": "k"}]
    assert [isinstance(found, GenerationRequest) for found in check(sources)] == [True, False, True]
    assert [isinstance(found, GenerationRequest) for found in check(sources, None, presign=True)] == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("code", "retry_after", "fields", "storage", "own"),
    [
        (ErrorCode.LORA_DOWNLOAD_FAILED, 0, {"lora_url": OWN_URL}, STORAGE, True),
        (ErrorCode.LORA_DOWNLOAD_FAILED, 0, {"loras": [{"key": "b"}, {"url": OWN_URL}]}, STORAGE, True),
        (ErrorCode.UPLOAD_FAILED, 0, {"upload_url": OWN_URL}, STORAGE, True),
        (ErrorCode.LORA_DOWNLOAD_FAILED, 60, {"lora_url": OWN_URL}, STORAGE, False),
        (ErrorCode.LORA_DOWNLOAD_FAILED, None, {"lora_url": OWN_URL}, STORAGE, False),
        (ErrorCode.LORA_DOWNLOAD_FAILED, 0, {"lora_key": "a", "upload_url": OWN_URL}, STORAGE, False),
        (ErrorCode.LORA_DOWNLOAD_FAILED, 0, {"lora_url": "https://x.example/a"}, STORAGE, False),
        (ErrorCode.UPLOAD_FAILED, 0, {"lora_url": OWN_URL}, STORAGE, False),
        (ErrorCode.TIMEOUT, 0, {"lora_url": OWN_URL}, STORAGE, False),
        (ErrorCode.LORA_DOWNLOAD_FAILED, 0, {"lora_url": OWN_URL}, None, False),
        (ErrorCode.LORA_DOWNLOAD_FAILED, 0, {"steps": 3}, STORAGE, False),
    ],
)
def test_only_an_expired_url_into_the_own_bucket_is_worth_signing_again(
    code: ErrorCode, retry_after: int | None, fields: dict[str, Any], storage: PresignedUrls | None, own: bool
) -> None:
    failed = event_kit.failed("j")
    data = failed.data.model_copy(update={"error_code": code, "retry_after": retry_after})
    payload = json.dumps({"job_id": "j", "prompt": "a fox", **fields}).encode()
    assert own_url_expired(failed.model_copy(update={"data": data}), payload, storage) is own
