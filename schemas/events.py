"""The events that consumers publish: a union told apart by `type`, and the bytes that a webhook carries too."""

from datetime import UTC, datetime
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, PlainSerializer, TypeAdapter, ValidationError

from schemas.errors import ErrorCode
from schemas.redact import redact_text, redact_value


def _rfc3339(value: datetime) -> str:
    return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


Timestamp = Annotated[datetime, PlainSerializer(_rfc3339, return_type=str, when_used="json")]
Seconds = Annotated[float, Field(ge=0)]


class EventError(ValueError):
    """Bytes that are not an event of this contract. Its text never repeats them."""


class _Part(BaseModel):
    # A newer consumer may say more than this reader knows: what it adds is passed over.
    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True, protected_namespaces=())


class AppliedLora(_Part):
    """One LoRA of a picture. `modules`: weights it changed; `skipped`: keys that match nothing in the model."""

    name: str
    version: str | None = None
    scale: float
    modules: int
    skipped: int = 0


class ModelInfo(_Part):
    """What drew the picture."""

    base_model: str
    lora_applied: bool
    lora_version: str | None = None
    lora_scale: float | None = None
    loras: tuple[AppliedLora, ...] = ()


class GenerationMetadata(_Part):
    """The parameters that were used."""

    seed_used: int
    actual_steps: int
    actual_cfg: float


class Timings(_Part):
    """Where the time went, in seconds. `queued`: in the stream and waiting for the GPU behind other jobs."""

    queued: Seconds
    prepare: Seconds
    generate: Seconds
    encode: Seconds
    upload: Seconds
    total: Seconds


class EventData(_Part):
    """What every event says. `attempt` is 0 if none began."""

    job_id: str
    run: int
    attempt: int
    consumer: str | None
    request_metadata: dict[str, JsonValue] = Field(default_factory=dict)


class StartedData(EventData):
    queued: Seconds


class _ErrorData(EventData):
    error: str
    error_code: ErrorCode
    details: dict[str, JsonValue] = Field(default_factory=dict)


_ErrorDataT = TypeVar("_ErrorDataT", bound=_ErrorData)


class RetryingData(_ErrorData):
    """`retry_after`: seconds until the consumers try again by themselves."""

    retry_after: float


class FailedData(_ErrorData):
    """`retry_after`: seconds after which a new run can succeed (0: at once, with fresh URLs); None: never."""

    retry_after: int | None
    dead_lettered: bool


class CancelledData(EventData):
    error_code: Literal[ErrorCode.CANCELLED] = ErrorCode.CANCELLED
    stage: Literal["queued", "delayed", "preparing", "running"]


class SucceededData(EventData):
    """`image_size` is [width, height] in pixels; `generation_time_seconds` is denoising and decoding."""

    image_url: str | None
    image_key: str | None
    image_sha256: str
    image_bytes: int
    image_size: tuple[int, int]
    generation_time_seconds: Seconds
    model_info: ModelInfo
    metadata: GenerationMetadata
    timings: Timings
    gpu: str
    gpu_seconds: Seconds
    warnings: tuple[str, ...] = ()


class _Event(_Part):
    id: str
    timestamp: Timestamp

    def encode(self) -> bytes:
        """The `payload` of a completion, and the body of a webhook."""
        return self.model_dump_json().encode()


class StartedEvent(_Event):
    """The job has the GPU."""

    type: Literal["generation.started"] = "generation.started"
    data: StartedData


class RetryingEvent(_Event):
    """An attempt failed; the consumers will try again."""

    type: Literal["generation.retrying"] = "generation.retrying"
    data: RetryingData


class SucceededEvent(_Event):
    """The picture is in the storage."""

    type: Literal["generation.succeeded"] = "generation.succeeded"
    data: SucceededData


class FailedEvent(_Event):
    """The run has ended without a picture."""

    type: Literal["generation.failed"] = "generation.failed"
    data: FailedData


class CancelledEvent(_Event):
    """The run has ended because somebody asked for it."""

    type: Literal["generation.cancelled"] = "generation.cancelled"
    data: CancelledData


TerminalEvent = SucceededEvent | FailedEvent | CancelledEvent
Event = StartedEvent | RetryingEvent | TerminalEvent
EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="type")])


def event_id(data: EventData, kind: str, *, with_attempt: bool = False) -> str:
    """`<job_id>:<run>:<kind>`, followed by the attempt for the kinds that a run can have several of."""
    suffix = f":{data.attempt}" if with_attempt else ""
    return f"{data.job_id}:{data.run}:{kind}{suffix}"


def started(data: StartedData, at: datetime) -> StartedEvent:
    return StartedEvent(id=event_id(data, "started", with_attempt=True), timestamp=at, data=data)


def retrying(data: RetryingData, at: datetime) -> RetryingEvent:
    return RetryingEvent(id=event_id(data, "retrying", with_attempt=True), timestamp=at, data=_redacted(data))


def succeeded(data: SucceededData, at: datetime) -> SucceededEvent:
    return SucceededEvent(id=event_id(data, "succeeded"), timestamp=at, data=data)


def failed(data: FailedData, at: datetime) -> FailedEvent:
    return FailedEvent(id=event_id(data, "failed"), timestamp=at, data=_redacted(data))


def cancelled(data: CancelledData, at: datetime) -> CancelledEvent:
    return CancelledEvent(id=event_id(data, "cancelled"), timestamp=at, data=data)


def _redacted(data: _ErrorDataT) -> _ErrorDataT:
    return data.model_copy(update={"error": redact_text(data.error), "details": redact_value(data.details)})


def decode_event(payload: bytes) -> Event:
    """Parses the `payload` of a completion.

    Raises EventError.
    """
    try:
        return EVENT.validate_json(payload)
    except ValidationError as error:
        raise EventError(f"not an event: {error.error_count()} problems, first {error.errors()[0]['type']}") from None


def is_terminal(event_type: str) -> bool:
    """Whether an event of this type ends its run."""
    return event_type in ("generation.succeeded", "generation.failed", "generation.cancelled")
