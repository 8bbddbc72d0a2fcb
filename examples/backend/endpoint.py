"""The provider `http`: `POST /generate-image` answers with the picture. The call waits, so few are made at once."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

import aiohttp
from pydantic import Base64Bytes, BaseModel

from examples.backend.content import Outcome
from examples.backend.settings import BackendSettings
from examples.backend.tables import CANCELLED, FAILED, SUCCEEDED, OutboxEntry
from producer.errors import QueueFull
from producer.storage import PresignedUrls
from schemas.errors import ErrorCode

_CALLS_AT_ONCE = 8
_CALL_LIMIT_S = 150.0  # platforms cut HTTP calls there
_PAUSE_S = 10
_BODY = ("prompt", "width", "height", "steps", "timeout", "lora_url", "lora_scale")
_NOT_NOW = (
    HTTPStatus.UNAUTHORIZED,  # the operator's to mend, as the next two
    HTTPStatus.FORBIDDEN,
    HTTPStatus.NOT_FOUND,
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.SERVICE_UNAVAILABLE,
)


class _Metadata(BaseModel):
    seed_used: int


class _Picture(BaseModel):
    image_base64: Base64Bytes
    image_url: str | None = None
    generation_time_seconds: float
    metadata: _Metadata


class _Problem(BaseModel):
    error: str
    error_code: str
    retry_after: int | None = None


class Endpoint:
    """`storage` signs the URLs of LoRAs in the own bucket: the endpoint knows no keys."""

    def __init__(self, session: aiohttp.ClientSession, storage: PresignedUrls | None) -> None:
        self._session = session
        self._storage = storage
        self._free = asyncio.Semaphore(_CALLS_AT_ONCE)

    async def generate_many(self, entries: Sequence[OutboxEntry]) -> list[Outcome | QueueFull]:
        """Returns when the last of them has its picture, or its error."""
        return await asyncio.gather(*(self._generate(entry.request) for entry in entries))

    async def _generate(self, request: dict[str, Any]) -> Outcome | QueueFull:
        job_id: str = request["job_id"]
        async with self._free:
            if datetime.fromisoformat(request["expires_at"]) <= datetime.now(UTC):
                return Outcome(FAILED, error_code=ErrorCode.EXPIRED, error="nobody waits any more", retry_after=0)
            try:
                return await self._call(job_id, self._body(request))
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                reason = f"the endpoint cannot be reached, or understood: {type(error).__name__}"
                return QueueFull(reason, job_id=job_id, retry_after=_PAUSE_S)

    def _body(self, request: dict[str, Any]) -> dict[str, Any]:
        body = {name: request[name] for name in _BODY if name in request}
        if "lora_key" in request:
            if self._storage is None:
                raise ValueError("a LoRA in the own bucket needs R2_* to be signed")
            body["lora_url"] = self._storage.lora_url(request["lora_key"])
        return body

    async def _call(self, job_id: str, body: dict[str, Any]) -> Outcome | QueueFull:
        """Raises aiohttp.ClientError, TimeoutError, ValueError."""
        # Under the same key a call that is made again joins the first one.
        async with self._session.post("generate-image", json=body, headers={"Idempotency-Key": job_id}) as response:
            answer = await response.read()
        if response.status == HTTPStatus.OK:
            return _outcome(job_id, _Picture.model_validate_json(answer))
        if response.status in _NOT_NOW:
            pause_s = response.headers.get("Retry-After", "")
            reason = f"the endpoint answers {response.status}"
            return QueueFull(reason, job_id=job_id, retry_after=int(pause_s) if pause_s.isdecimal() else _PAUSE_S)
        problem = _Problem.model_validate_json(answer)
        status = CANCELLED if problem.error_code == ErrorCode.CANCELLED else FAILED
        return Outcome(status, error_code=problem.error_code, error=problem.error, retry_after=problem.retry_after)


def _outcome(job_id: str, picture: _Picture) -> Outcome:
    return Outcome(
        SUCCEEDED,
        image_url=picture.image_url,
        image_key=f"images/{job_id}.png",  # where the queue's own endpoint has left it
        image_sha256=hashlib.sha256(picture.image_base64).hexdigest(),
        seed=picture.metadata.seed_used,
        timings={"generate": picture.generation_time_seconds},
    )


@asynccontextmanager
async def open_endpoint(settings: BackendSettings) -> AsyncIterator[Endpoint]:
    """The endpoint at `MODAL_ENDPOINT_URL`, called with the token `MODAL_API_TOKEN`."""
    token = settings.api_token
    async with aiohttp.ClientSession(
        (settings.endpoint_url or "").rstrip("/") + "/",
        headers={"Authorization": f"Bearer {token.get_secret_value()}"} if token else {},
        timeout=aiohttp.ClientTimeout(_CALL_LIMIT_S),
    ) as session:
        yield Endpoint(session, PresignedUrls.from_settings(settings))
