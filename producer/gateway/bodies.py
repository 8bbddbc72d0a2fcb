"""From the bytes of a call to a request that fits the contract."""

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Header, Request

from producer.errors import RequestRefused
from producer.gateway.errors import GatewayError, GatewayErrorCode
from producer.requests import make_request
from schemas import strict_json
from schemas.errors import ErrorCode
from schemas.fields import JOB_ID_PATTERN
from schemas.requests import MAX_PAYLOAD_BYTES, GenerationRequest

SYNCHRONOUS_FIELDS = (
    "prompt",
    "negative_prompt",
    "lora_url",
    "lora_scale",
    "lora_version",
    "width",
    "height",
    "steps",
    "cfg",
    "seed",
    "timeout",
)
_BODY_S = 20.0

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern=JOB_ID_PATTERN,
        description="Becomes the job's id: the same key with the same body is the same job, however often it is sent.",
        examples=["order-1041"],
    ),
]


async def read_json(request: Request) -> Any:
    """The body, of which no more than 64 KiB are read.

    Raises GatewayError, and starlette's ClientDisconnect where the caller leaves meanwhile.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise GatewayError(GatewayErrorCode.UNSUPPORTED_MEDIA_TYPE, "the body has to be application/json")
    try:
        async with asyncio.timeout(_BODY_S):
            raw = await _read(request)
    except TimeoutError:
        raise GatewayError(GatewayErrorCode.REQUEST_TIMEOUT, f"the body has not come within {_BODY_S:g} s") from None
    try:
        return strict_json.loads(raw)
    except strict_json.StrictJsonError as error:
        raise GatewayError(ErrorCode.INVALID_REQUEST, f"the body: {error}") from None


async def _read(request: Request) -> bytes:
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MAX_PAYLOAD_BYTES:
            raise GatewayError(GatewayErrorCode.PAYLOAD_TOO_LARGE, f"the body is larger than {MAX_PAYLOAD_BYTES} bytes")
    return bytes(raw)


def wire_request(body: Any, key: str | None) -> GenerationRequest:
    """The request that a body is. Its own `job_id` goes before the idempotency key.

    Raises RequestRefused.
    """
    fields = _object(body)
    if key is not None and fields.get("job_id") is None:
        fields = {**fields, "job_id": key}
    return make_request(fields)


def synchronous_request(body: Any, key: str | None) -> GenerationRequest:
    """The request that a body of the synchronous contract is: fewer fields, and no `job_id` among them.

    Raises RequestRefused.
    """
    fields = _object(body)
    foreign = [name for name in GenerationRequest.model_fields if name in fields and name not in SYNCHRONOUS_FIELDS]
    if foreign:
        problems = [{"field": name, "problem": "is no field of this call: see POST /v1/jobs"} for name in foreign]
        raise RequestRefused(f"{foreign[0]}: {problems[0]['problem']}", details={"problems": problems})
    return wire_request(fields, key)


def _object(body: Any) -> Mapping[str, Any]:
    if not isinstance(body, dict):
        raise RequestRefused("the body is no JSON object")
    return body
