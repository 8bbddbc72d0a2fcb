"""An entry of a request stream: the envelope around a request, decoded without ever raising."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from schemas import strict_json
from schemas.errors import ErrorCode
from schemas.fields import is_job_id
from schemas.requests import GenerationRequest, RequestError, decode_request, metadata_of

MAX_RUN = 2**31 - 1
MAX_SALVAGED_BYTES = 2 * 1024 * 1024
# https://www.w3.org/TR/trace-context/: the version ff and ids of zeros are no good
_TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True, slots=True)
class RequestEntry:
    """What a stream entry says.

    `job_id` is None when none can be read: such an entry is a dead letter. `request` is None exactly when `error` says
    why the payload was refused. `raw` keeps the payload's bytes whatever they are; `metadata` is what events echo.
    """

    job_id: str | None
    run: int
    request: GenerationRequest | None
    error: RequestError | None
    raw: bytes
    metadata: dict[str, JsonValue]
    traceparent: str | None = None


def decode_entry(fields: Mapping[bytes, bytes]) -> RequestEntry:
    """Reads the fields of a stream entry, whatever is in them."""
    raw = fields.get(b"payload", b"")
    traceparent = _traceparent(fields.get(b"traceparent", b""))
    named = _job_id(fields.get(b"job_id"))
    run = _run(fields.get(b"run"))
    try:
        request = decode_request(raw)
        if named is not None and named != request.job_id:
            raise RequestError(ErrorCode.INVALID_REQUEST, "the entry's job_id is not the payload's")
        if b"job_id" in fields and named is None:
            raise RequestError(ErrorCode.INVALID_REQUEST, "the entry's job_id is not a job id")
        if run is None:
            raise RequestError(ErrorCode.INVALID_REQUEST, "the entry's run is not a positive integer")
    except RequestError as error:
        job_id = named or _job_id(_salvage(raw))
        return RequestEntry(job_id, run or 1, None, error, raw, metadata_of(raw), traceparent)
    return RequestEntry(request.job_id, run, request, None, raw, request.metadata, traceparent)


def is_traceparent(value: str) -> bool:
    """Whether `value` is a trace context that consumers take over."""
    return _traceparent(value.encode("utf-8", "replace")) is not None


def _salvage(raw: bytes) -> str | None:
    # What is absurdly large is not worth the seconds that parsing it takes
    return strict_json.salvage_string(raw, "job_id") if len(raw) <= MAX_SALVAGED_BYTES else None


def _job_id(value: bytes | str | None) -> str | None:
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    return text if is_job_id(text) else None


def _traceparent(value: bytes) -> str | None:
    # As the standard has it, a broken one is ignored: a trace is no reason to refuse a job.
    return value.decode() if _TRACEPARENT.fullmatch(value) else None


def _run(value: bytes | None) -> int | None:
    if value is None:
        return 1
    if not value.isdigit() or len(value) > 10:
        return None
    run = int(value)
    return run if 1 <= run <= MAX_RUN else None
