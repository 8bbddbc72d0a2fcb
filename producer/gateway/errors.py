"""What went wrong, as an HTTP answer: `{error, error_code, details, retry_after}`, and `job_id` where it is known."""

from enum import StrEnum
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import compile_path

from producer.errors import ClientErrorCode, ProducerError
from schemas.errors import ErrorCode

RETRY_UNAVAILABLE_S = 5
CLOSED_BY_CALLER = 499  # nobody reads it

log = structlog.get_logger(__name__)


class GatewayErrorCode(StrEnum):
    """`error_code` of what is neither an event's nor the client's: HTTP itself, or something that is out of reach."""

    UNAUTHORIZED = "UNAUTHORIZED"
    NOT_FOUND = "NOT_FOUND"
    METHOD_NOT_ALLOWED = "METHOD_NOT_ALLOWED"
    REQUEST_TIMEOUT = "REQUEST_TIMEOUT"
    PAYLOAD_TOO_LARGE = "PAYLOAD_TOO_LARGE"
    UNSUPPORTED_MEDIA_TYPE = "UNSUPPORTED_MEDIA_TYPE"
    IMAGE_UNAVAILABLE = "IMAGE_UNAVAILABLE"
    UNAVAILABLE = "UNAVAILABLE"


AnyCode = ErrorCode | ClientErrorCode | GatewayErrorCode

STATUS: dict[AnyCode, int] = {
    ErrorCode.INVALID_REQUEST: 400,
    ErrorCode.INVALID_PROMPT: 400,
    ErrorCode.LORA_DOWNLOAD_FAILED: 400,  # 502 where the storage is to blame: see `status_of`
    ErrorCode.LORA_LOAD_FAILED: 400,
    ErrorCode.MODEL_LOAD_FAILED: 503,
    ErrorCode.GENERATION_FAILED: 500,
    ErrorCode.CUDA_OOM: 503,
    ErrorCode.TIMEOUT: 504,
    ErrorCode.UPLOAD_FAILED: 502,
    ErrorCode.EXPIRED: 504,
    ErrorCode.CANCELLED: 409,
    ErrorCode.WORKER_LOST: 503,
    ErrorCode.INTERNAL: 500,
    ClientErrorCode.JOB_CONFLICT: 409,
    ClientErrorCode.QUEUE_FULL: 429,
    ClientErrorCode.JOB_UNKNOWN: 404,
    GatewayErrorCode.UNAUTHORIZED: 401,
    GatewayErrorCode.NOT_FOUND: 404,
    GatewayErrorCode.METHOD_NOT_ALLOWED: 405,
    GatewayErrorCode.REQUEST_TIMEOUT: 408,
    GatewayErrorCode.PAYLOAD_TOO_LARGE: 413,
    GatewayErrorCode.UNSUPPORTED_MEDIA_TYPE: 415,
    GatewayErrorCode.IMAGE_UNAVAILABLE: 502,
    GatewayErrorCode.UNAVAILABLE: 503,
}

_OF_HTTP = {404: GatewayErrorCode.NOT_FOUND, 405: GatewayErrorCode.METHOD_NOT_ALLOWED}


class GatewayError(Exception):
    """Becomes the answer. `retry_after` is in seconds; None: never with this request."""

    def __init__(
        self,
        code: AnyCode,
        message: str,
        *,
        details: dict[str, Any] | None = None,
        retry_after: int | None = None,
        job_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.details = details or {}
        self.retry_after = retry_after
        self.job_id = job_id


def status_of(code: AnyCode, retry_after: int | None) -> int:
    """The HTTP status. A LoRA that could not be had is the caller's fault unless waiting alone can help."""
    if code is ErrorCode.LORA_DOWNLOAD_FAILED and retry_after:
        return 502
    return STATUS.get(code, 500)


def document(error: Exception) -> dict[str, Any]:
    """The body of the answer that an error becomes, without anything secret."""
    known = _known(error)
    body: dict[str, Any] = {
        "error": str(known),
        "error_code": known.code,
        "details": known.details,
        "retry_after": known.retry_after,
    }
    return body if known.job_id is None else {**body, "job_id": known.job_id}


def answer(error: Exception) -> JSONResponse:
    """The answer that an error becomes; `Retry-After` only where the very same call may be made again."""
    known = _known(error)
    status = status_of(known.code, known.retry_after)
    headers: dict[str, str] = {}
    if known.retry_after is not None and (status == 429 or status >= 500):
        headers["Retry-After"] = str(known.retry_after)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(document(known), status, headers)


def _known(error: Exception) -> GatewayError:
    match error:
        case GatewayError():
            return error
        case ProducerError():
            code = error.error_code or ErrorCode.INTERNAL
            retry_after = 0 if code is ErrorCode.TIMEOUT else error.retry_after
            return GatewayError(code, str(error), details=error.details, retry_after=retry_after, job_id=error.job_id)
        case RedisError():
            return GatewayError(
                GatewayErrorCode.UNAVAILABLE, "Redis is out of reach or refuses", retry_after=RETRY_UNAVAILABLE_S
            )
        case RequestValidationError():
            return _invalid(error)
        case _:
            return GatewayError(ErrorCode.INTERNAL, "a defect of the gateway: see its log", retry_after=60)


def _invalid(error: RequestValidationError) -> GatewayError:
    problems = [{"field": ".".join(map(str, report["loc"][1:])), "problem": report["msg"]} for report in error.errors()]
    message = "; ".join(f"{problem['field']}: {problem['problem']}" for problem in problems)
    return GatewayError(ErrorCode.INVALID_REQUEST, message, details={"problems": problems})


def install(app: FastAPI) -> None:
    """Gives every error of the application this one shape."""

    async def told(_request: Request, error: Exception) -> JSONResponse:
        return answer(error)

    async def out_of_reach(_request: Request, error: Exception) -> JSONResponse:
        log.warning("redis_out_of_reach", error=type(error).__name__)
        return answer(error)

    async def of_http(request: Request, error: Exception) -> JSONResponse:
        status = error.status_code if isinstance(error, HTTPException) else 500
        reply = answer(
            GatewayError(_OF_HTTP.get(status, ErrorCode.INVALID_REQUEST), "no such route, or no such method")
        )
        if status == 405:
            reply.headers["Allow"] = ", ".join(_methods(app, request.url.path))
        return reply

    async def left(_request: Request, _error: Exception) -> Response:
        return Response(status_code=CLOSED_BY_CALLER)

    for kind in (GatewayError, ProducerError, RequestValidationError, Exception):
        app.add_exception_handler(kind, told)
    app.add_exception_handler(RedisError, out_of_reach)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(ClientDisconnect, left)


def _methods(app: FastAPI, path: str) -> list[str]:
    """All methods of a path; the router would name those of its first route."""
    documented: dict[str, dict[str, Any]] = app.openapi()["paths"]
    templates = [template for template in documented if compile_path(template)[0].match(path)]
    return sorted(method.upper() for template in templates for method in documented[template])
