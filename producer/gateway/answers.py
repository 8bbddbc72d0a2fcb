"""What the routes answer."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, JsonValue

from producer.jobs import CancelVerdict
from schemas.events import CancelledEvent, FailedEvent, SucceededEvent
from schemas.keys import JobState, Priority


def _with_example(**example: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [example]}, protected_namespaces=())


class ErrorAnswer(BaseModel):
    """`retry_after`: seconds after which the same call can succeed, 0 at once (with a fresh URL if that failed), null
    never. `job_id` is there where the job is known.
    """

    error: str
    error_code: str
    details: dict[str, JsonValue]
    retry_after: int | None
    job_id: str | None = None


class PictureModel(BaseModel):
    """What drew the picture."""

    model_config = ConfigDict(protected_namespaces=())

    base_model: str
    lora_applied: bool
    lora_version: str | None
    lora_scale: float | None


class PictureMetadata(BaseModel):
    """The parameters that were used."""

    seed_used: int
    actual_steps: int
    actual_cfg: float


class Picture(BaseModel):
    """`image_base64`: the PNG. `image_size`: [width, height] in pixels. `generation_time_seconds`: on the GPU."""

    model_config = _with_example(
        image_base64="iVBORw0KGgo…",
        image_size=[1024, 1024],
        generation_time_seconds=0.82,
        model_info={
            "base_model": "stabilityai/stable-diffusion-xl-base-1.0",
            "lora_applied": True,
            "lora_version": "v3",
            "lora_scale": 0.8,
        },
        metadata={"seed_used": 1234567, "actual_steps": 28, "actual_cfg": 5.5},
        image_url="https://pictures.example/images/order-1041.png",
        job_id="order-1041",
    )

    image_base64: str
    image_size: tuple[int, int]
    generation_time_seconds: float
    model_info: PictureModel
    metadata: PictureMetadata
    image_url: str | None
    job_id: str


class Accepted(BaseModel):
    """`duplicate`: the job was there before, and `state` is how far it has come."""

    model_config = _with_example(job_id="order-1041", run=1, state="queued", duplicate=False)

    job_id: str
    run: int
    state: JobState
    duplicate: bool


class JobDocument(BaseModel):
    """`event`: the terminal event of a run that has ended, as it was published."""

    model_config = _with_example(
        job_id="order-1041",
        state="running",
        run=1,
        attempt=1,
        priority="normal",
        submitted_at="2026-03-01T12:30:00.480Z",
        ended_at=None,
        consumer="gpu-7f3a",
        event=None,
    )

    job_id: str
    state: JobState
    run: int
    attempt: int
    priority: Priority
    submitted_at: datetime
    ended_at: datetime | None
    consumer: str | None
    event: SucceededEvent | FailedEvent | CancelledEvent | None


class Cancellation(BaseModel):
    """`verdict`: cancelled (it waited), asked (its consumer will stop it), ended (it had). `state`: what was found."""

    model_config = _with_example(job_id="order-1041", verdict="cancelled", state="queued")

    job_id: str
    verdict: CancelVerdict
    state: JobState | None


class Health(BaseModel):
    """`backlog`: jobs that wait or are in progress. `oldest_waiting_seconds`: since the oldest of them was added."""

    model_config = _with_example(status="ok", backlog=3, live_consumers=1, oldest_waiting_seconds=1.25)

    status: Literal["ok", "unavailable"]
    backlog: int
    live_consumers: int
    oldest_waiting_seconds: float
