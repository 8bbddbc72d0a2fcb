"""From what a caller gives to a request that fits the contract, and from an ended run's request to the next one's."""

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypedDict

from pydantic_core import to_json

from producer.errors import RequestRefused
from producer.storage import PresignedUrls
from schemas import strict_json
from schemas.errors import ErrorCode
from schemas.events import FailedEvent
from schemas.fields import is_job_id
from schemas.requests import GenerationRequest, LoraRef, RequestError, decode_request

_EXCLUSIVE = (("lora_url", "lora_key", "loras"), ("upload_url", "output_key"))


class RequestChanges(TypedDict, total=False):
    """The fields of a request, save its id, as keyword arguments; the contract has their meaning and bounds."""

    v: int
    prompt: str
    negative_prompt: str
    lora_url: str | None
    lora_key: str | None
    lora_scale: float
    lora_version: str | None
    lora_sha256: str | None
    loras: Sequence[LoraRef | Mapping[str, Any]]
    width: int
    height: int
    steps: int
    cfg: float
    seed: int | None
    timeout: int
    expires_at: datetime | str | None
    tenant: str | None
    output_key: str | None
    upload_url: str | None
    webhook_url: str | None
    metadata: Mapping[str, Any]


class RequestFields(RequestChanges, total=False):
    """The fields of a request as keyword arguments."""

    job_id: str


def make_request(source: GenerationRequest | Mapping[str, Any]) -> GenerationRequest:
    """Checks a request as a consumer will; one without a `job_id` gets a new one.

    Raises RequestRefused.
    """
    if isinstance(source, GenerationRequest):
        fields: Mapping[str, Any] = source.model_dump(exclude_defaults=True, warnings=False)
    else:
        fields = source if source.get("job_id") is not None else {**source, "job_id": uuid.uuid4().hex}
    job_id = fields.get("job_id")
    named = job_id if is_job_id(job_id) else None
    try:
        return decode_request(to_json(fields))
    except RequestError as error:
        raise RequestRefused(str(error), job_id=named, error_code=error.code, details=error.details) from None
    except (ValueError, TypeError, RecursionError):
        raise RequestRefused(
            "the fields cannot be written as JSON", job_id=named, error_code=ErrorCode.INVALID_REQUEST
        ) from None


def check(
    sources: Iterable[GenerationRequest | Mapping[str, Any]],
    storage: PresignedUrls | None = None,
    *,
    presign: bool = False,
) -> list[GenerationRequest | RequestRefused]:
    """Each request as it is to be submitted, or the error in its place."""
    checked: list[GenerationRequest | RequestRefused] = []
    for source in sources:
        try:
            request = make_request(source)
            checked.append(presigned(request, storage) if presign else request)
        except RequestRefused as error:
            checked.append(error)
    return checked


def presigned(request: GenerationRequest, storage: PresignedUrls | None) -> GenerationRequest:
    """The same request with a freshly signed URL in place of each LoRA's key.

    Raises RequestRefused where there is a key and no storage to sign it.
    """
    if all(lora.key is None for lora in request.lora_refs):
        return request
    if storage is None:
        raise _refused(
            "a LoRA's key cannot be presigned: the storage settings (R2_…) are not complete", "lora_key", request.job_id
        )
    fields = request.model_dump(exclude_defaults=True, warnings=False)
    if request.lora_key is not None:
        fields["lora_url"] = storage.lora_url(fields.pop("lora_key"))
    for lora in fields.get("loras", ()):
        if "key" in lora:
            lora["url"] = storage.lora_url(lora.pop("key"))
    return make_request(fields)


def follow_up(
    payload: bytes, changes: Mapping[str, Any], storage: PresignedUrls | None, now: datetime
) -> GenerationRequest:
    """The next run's request: `payload` of the last one, kept without signatures, with `changes` in it.

    A URL that has lost its query and is in the own bucket is signed again. Raises RequestRefused, also where a URL
    would need a fresh signature that only the caller can get, or where `expires_at` has passed.
    """
    try:
        body = strict_json.loads(payload)
    except strict_json.StrictJsonError:
        body = None
    if not isinstance(body, dict):
        raise _refused("the last run's request cannot be read: give a whole request", "request")
    for group in _EXCLUSIVE:
        if any(name in changes for name in group):
            body = {name: value for name, value in body.items() if name not in group}
    request = make_request({**body, **_sign_again(body, storage), **changes})
    if request.expires_at is not None and request.expires_at <= now:
        raise _refused("expires_at has passed: give another", "expires_at")
    return request


def own_url_expired(event: FailedEvent, payload: bytes, storage: PresignedUrls | None) -> bool:
    """Whether a run with this request failed for want of a fresh signature that `storage` can give."""
    if storage is None or event.data.retry_after != 0:
        return False
    try:
        request = decode_request(payload)
    except RequestError:
        return False
    urls = {
        ErrorCode.LORA_DOWNLOAD_FAILED: [lora.url for lora in request.lora_refs],
        ErrorCode.UPLOAD_FAILED: [request.upload_url],
    }.get(event.data.error_code, [])
    return any(url is not None and storage.owns(url) is not None for url in urls)


def _sign_again(body: Mapping[str, Any], storage: PresignedUrls | None) -> dict[str, Any]:
    signed: dict[str, Any] = {}
    if isinstance(url := body.get("lora_url"), str):
        signed["lora_url"] = _fresh(url, "lora_url", storage, PresignedUrls.lora_url)
    if isinstance(url := body.get("upload_url"), str):
        signed["upload_url"] = _fresh(url, "upload_url", storage, PresignedUrls.upload_url)
    if isinstance(loras := body.get("loras"), list):
        signed["loras"] = [_lora_signed_again(lora, f"loras.{i}.url", storage) for i, lora in enumerate(loras)]
    return signed


def _lora_signed_again(lora: Any, field: str, storage: PresignedUrls | None) -> Any:
    if not isinstance(lora, dict) or not isinstance(lora.get("url"), str):
        return lora
    return {**lora, "url": _fresh(lora["url"], field, storage, PresignedUrls.lora_url)}


def _fresh(url: str, field: str, storage: PresignedUrls | None, sign: Callable[[PresignedUrls, str], str]) -> str:
    if "?" in url:
        return url
    key = storage.owns(url) if storage is not None else None
    if storage is None or key is None:
        raise _refused(f"{field} has lost its signature and is not in the own bucket: give a fresh one", field)
    return sign(storage, key)


def _refused(message: str, field: str, job_id: str | None = None) -> RequestRefused:
    return RequestRefused(message, job_id=job_id, details={"field": field})
