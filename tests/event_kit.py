"""Events of one job, as consumers publish them, and completions made of them."""

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

from producer.completions import Completion, decode_completion
from producer.queue import StreamEntry
from schemas import events
from schemas.errors import ErrorCode
from schemas.events import (
    CancelledData,
    Event,
    FailedData,
    GenerationMetadata,
    ModelInfo,
    RetryingData,
    StartedData,
    SucceededData,
    Timings,
)

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
_ids = itertools.count(1)


def data(job_id: str, run: int, attempt: int) -> dict[str, Any]:
    return {
        "job_id": job_id,
        "run": run,
        "attempt": attempt,
        "consumer": "c",
        "request_metadata": {"user": "ü", "big": 2**70},
    }


def started(job_id: str = "job-1", run: int = 1, attempt: int = 1) -> events.StartedEvent:
    return events.started(StartedData(**data(job_id, run, attempt), queued=0.5), NOW)


def retrying(job_id: str = "job-1", run: int = 1, attempt: int = 1, error: str = "no") -> events.RetryingEvent:
    more: dict[str, Any] = {"error": error, "error_code": ErrorCode.UPLOAD_FAILED, "retry_after": 2.5}
    return events.retrying(RetryingData(**data(job_id, run, attempt), **more), NOW)


def failed(
    job_id: str = "job-1", run: int = 1, attempt: int = 1, error: str = "no", dead: bool = True
) -> events.FailedEvent:
    more: dict[str, Any] = {"error": error, "error_code": ErrorCode.GENERATION_FAILED}
    retry_after = 30 if dead else None
    return events.failed(
        FailedData(**data(job_id, run, attempt), **more, retry_after=retry_after, dead_lettered=dead), NOW
    )


def cancelled(job_id: str = "job-1", run: int = 1, attempt: int = 1) -> events.CancelledEvent:
    return events.cancelled(CancelledData(**data(job_id, run, attempt), stage="queued"), NOW)


def succeeded(job_id: str = "job-1", run: int = 1, attempt: int = 1, **more: Any) -> events.SucceededEvent:
    fields: dict[str, Any] = {
        "image_url": f"https://images.example/images/{job_id}.png",
        "image_key": f"images/{job_id}.png",
        "image_sha256": "ab" * 32,
        "image_bytes": 1_234_567,
        "image_size": (1024, 768),
        "generation_time_seconds": 1.5,
        "model_info": ModelInfo(base_model="base", lora_applied=False),
        "metadata": GenerationMetadata(seed_used=2**32 - 1, actual_steps=28, actual_cfg=5.5),
        "timings": Timings(queued=1, prepare=2, generate=3, encode=4, upload=5, total=15),
        "gpu": "H200",
        "gpu_seconds": 1.25,
        **more,
    }
    return events.succeeded(SucceededData(**data(job_id, run, attempt), **fields), NOW + timedelta(seconds=9))


def completion(event: Event) -> Completion:
    """The event as it comes out of the stream, under an entry id of its own."""
    return raw_completion(event.encode())


def raw_completion(payload: bytes) -> Completion:
    return decode_completion(StreamEntry(f"1767323045000-{next(_ids)}", {b"payload": payload}))
