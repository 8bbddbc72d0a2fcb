"""Whether everything went as planned. Each check yields a sentence for each thing that did not."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator

from demo.jobs import EndedJob
from producer.store import StoredImage, StoredJob
from schemas.events import FailedEvent, SucceededEvent

# what the query of a presigned URL looks like, in either version of its signature
_SIGNATURE_MARKS = (b"x-amz-", b"awsaccesskeyid=", b"signature=")


def check_end(ended: EndedJob) -> Iterator[str]:
    """Compares a job's event, and its picture, with the plan."""
    job, event = ended.job, ended.event
    match event:
        case SucceededEvent() if job.error_code is None:
            yield from _check_picture(ended, event)
        case FailedEvent(data=data) if job.error_code is not None:
            if (data.error_code, data.retry_after) != (job.error_code, None):
                yield f"{job.job_id}: failed with {data.error_code}, retry after {data.retry_after}"
        case None:
            yield f"{job.job_id}: no terminal event arrived"
        case _:
            yield f"{job.job_id}: ended with {event.type}"


def check_stored(ended: EndedJob, job: StoredJob | None, image: StoredImage | None) -> Iterator[str]:
    """Compares the rows of the listener's database with the event."""
    event, job_id = ended.event, ended.job.job_id
    if event is None:
        return
    if job is None or f"generation.{job.state}" != event.type:
        yield f"{job_id}: the database says {job.state if job else 'nothing'}, the event {event.type}"
    if isinstance(event, SucceededEvent) and (image is None or image.sha256 != event.data.image_sha256):
        yield f"{job_id}: the database has another picture than the event"


def check_distinct(ends: Iterable[EndedJob]) -> Iterator[str]:
    """No LoRA, scale or prompt may be without effect: no two pictures are the same."""
    digests = Counter(end.event.data.image_sha256 for end in ends if isinstance(end.event, SucceededEvent))
    if any(count > 1 for count in digests.values()):
        yield "two jobs have the same picture"


def check_secrets(texts: Iterable[tuple[str, bytes]], credentials: Iterable[str]) -> Iterator[str]:
    """Looks into named texts for signed URLs and for what signs them."""
    marks = (*_SIGNATURE_MARKS, *(credential.lower().encode() for credential in credentials))
    for name, text in texts:
        if any(mark in text.lower() for mark in marks):
            yield f"{name} contains a signature or a credential"


def _check_picture(ended: EndedJob, event: SucceededEvent) -> Iterator[str]:
    job, data, png = ended.job, event.data, ended.png or b""
    if hashlib.sha256(png).hexdigest() != data.image_sha256 or len(png) != data.image_bytes:
        yield f"{job.job_id}: the stored picture is not the one that the event names"
    if data.image_size != (job.fields["width"], job.fields["height"]):
        yield f"{job.job_id}: the picture has the size {data.image_size}"
    applied = data.model_info.loras
    if len(applied) != _wanted_loras(ended) or not all(lora.modules for lora in applied):
        yield f"{job.job_id}: not every LoRA was applied"


def _wanted_loras(ended: EndedJob) -> int:
    fields = ended.job.fields
    return len(fields.get("loras", ())) + ("lora_url" in fields) + ("lora_key" in fields)
