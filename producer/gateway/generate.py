"""`POST /generate-image`: the synchronous contract over the queue."""

import asyncio
import base64
from datetime import UTC, datetime, timedelta

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from producer.errors import JobCancelled, JobFailed, JobUnknown, WaitTimeout
from producer.gateway.admission import admit
from producer.gateway.answers import Picture, PictureMetadata, PictureModel
from producer.gateway.bodies import IdempotencyKey, read_json, synchronous_request
from producer.gateway.errors import CLOSED_BY_CALLER, GatewayError, GatewayErrorCode
from producer.gateway.openapi import ALWAYS, SUBMISSION, SYNCHRONOUS_BODY, WAITING
from producer.gateway.state import Gateway, TheGateway
from producer.gateway.tasks import stop
from producer.gateway.waiters import Stay
from producer.pictures import Pictures, PictureUnavailable
from schemas.errors import ErrorCode
from schemas.events import SucceededEvent
from schemas.keys import Priority
from schemas.requests import GenerationRequest

router = APIRouter()
_RESPONSES = ALWAYS | SUBMISSION | WAITING


@router.post("/generate-image", response_model=Picture, responses=_RESPONSES, openapi_extra=SYNCHRONOUS_BODY)
async def generate_image(gateway: TheGateway, request: Request, idempotency_key: IdempotencyKey = None) -> Response:
    """Draws a picture and answers with it, within `timeout` and within 140 seconds, waiting in the queue included.

    Else it is 504, and the job is cancelled unless somebody else waits for it. So it is when the caller closes the
    connection.
    """
    began_s = asyncio.get_running_loop().time()
    wanted = synchronous_request(await read_json(request), idempotency_key)
    within_s = min(float(wanted.timeout), gateway.limit_s)
    ends_at = datetime.now(UTC) + timedelta(seconds=within_s)
    wanted = wanted.model_copy(update={"timeout": max(1, int(within_s)), "expires_at": ends_at})
    if gateway.pictures is None:
        raise GatewayError(GatewayErrorCode.UNAVAILABLE, "the gateway's storage settings (R2_…) are not complete")
    answering = asyncio.create_task(_answer(gateway, gateway.pictures, wanted))
    return await _while_wanted(gateway, request, wanted.job_id, answering, began_s + within_s)


async def _answer(gateway: Gateway, pictures: Pictures, wanted: GenerationRequest) -> Response:
    async with gateway.waiters.waiting(wanted.job_id) as stay:
        event = await _end_of(gateway, stay, wanted)
        return JSONResponse((await _picture(pictures, event)).model_dump(mode="json"))


async def _end_of(gateway: Gateway, stay: Stay, wanted: GenerationRequest) -> SucceededEvent:
    """Waits for the run that answers the call; for the next one where another caller's leaving or limit ended it."""
    while True:
        job = await stay.send(admit(gateway.for_callers, wanted, Priority.HIGH))  # somebody holds the line
        try:
            return await gateway.client.result(job.job_id, run=job.run)
        except JobUnknown:
            continue  # Redis has lost it
        except JobCancelled:
            if not await gateway.waiters.has_been_left(job.job_id, job.run):
                raise
        except JobFailed as error:
            if not job.duplicate or error.error_code is not ErrorCode.EXPIRED:
                raise


async def _picture(pictures: Pictures, event: SucceededEvent) -> Picture:
    data = event.data
    try:
        if data.image_key is None:
            raise PictureUnavailable("the picture is not in the project's own storage")
        png = await pictures.read(data.image_key, sha256=data.image_sha256)
    except PictureUnavailable as error:
        details = {"image_url": data.image_url}
        raise GatewayError(
            GatewayErrorCode.IMAGE_UNAVAILABLE, str(error), details=details, retry_after=5, job_id=data.job_id
        ) from None
    return Picture(
        image_base64=base64.b64encode(png).decode(),
        image_size=data.image_size,
        generation_time_seconds=data.generation_time_seconds,
        model_info=PictureModel(**data.model_info.model_dump(include=set(PictureModel.model_fields))),
        metadata=PictureMetadata(**data.metadata.model_dump()),
        image_url=data.image_url,
        job_id=data.job_id,
    )


async def _while_wanted(
    gateway: Gateway, request: Request, job_id: str, answering: asyncio.Task[Response], deadline_s: float
) -> Response:
    """The answer, unless before it the caller closes the connection, the gateway shuts down, or the time is over."""
    leaving = asyncio.create_task(_caller_leaves(request))
    closing = asyncio.create_task(gateway.closing.wait())
    left_s = max(0.0, deadline_s - asyncio.get_running_loop().time())
    try:
        done, _ = await asyncio.wait({answering, leaving, closing}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await stop(answering, leaving, closing)
    if answering in done:
        return answering.result()
    if leaving in done:
        return Response(status_code=CLOSED_BY_CALLER)
    if closing in done:
        raise GatewayError(
            GatewayErrorCode.UNAVAILABLE, "the gateway shuts down: call again", retry_after=1, job_id=job_id
        )
    raise WaitTimeout("there was no picture within the call's time", job_id=job_id, retry_after=0)


async def _caller_leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
