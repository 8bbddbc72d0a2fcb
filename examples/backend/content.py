"""What happens to a content piece in the database: it is ordered, and it gets its outcome. These calls block."""

import math
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import update
from sqlalchemy.orm import Session, sessionmaker

from examples.backend.tables import CANCELLED, FAILED, PENDING, SUCCEEDED, Avatar, Content, OutboxEntry
from producer.errors import ProducerError
from schemas.events import CancelledEvent, FailedEvent, SucceededEvent, TerminalEvent
from schemas.keys import Priority

_MAX_ATTEMPT_S = 300  # the contract's bound on `timeout`


class Tier(StrEnum):
    FREE = "free"
    STANDARD = "standard"
    PREMIUM = "premium"


@dataclass(frozen=True, slots=True)
class Quality:
    """What a tier gets. Sides are in pixels."""

    steps: int
    width: int
    height: int
    priority: Priority


QUALITY = {
    Tier.FREE: Quality(20, 512, 512, Priority.LOW),
    Tier.STANDARD: Quality(28, 1024, 1024, Priority.NORMAL),
    Tier.PREMIUM: Quality(40, 1024, 1344, Priority.HIGH),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run has ended: the columns of `content` that it decides."""

    status: str
    image_url: str | None = None
    image_key: str | None = None
    image_sha256: str | None = None
    seed: int | None = None
    timings: dict[str, Any] | None = None
    error_code: str | None = None
    error: str | None = None
    retry_after: int | None = None


class UnknownAvatar(LookupError):
    """There is no avatar of this id."""


def order(
    sessions: sessionmaker[Session], avatar_id: str, custom_prompt: str, tier: Tier, *, timeout_s: float
) -> Content:
    """Stores a content piece and the request for it, both or neither. After `timeout_s` seconds nobody waits for it.

    The request has its id and its time limit from here on: however often it is published, it is the same job.
    Raises UnknownAvatar.
    """
    with sessions.begin() as session:
        avatar = session.get(Avatar, avatar_id)
        if avatar is None:
            raise UnknownAvatar(avatar_id)
        content_id = uuid.uuid4().hex
        content = Content(
            id=content_id,
            job_id=f"content-{content_id}",
            avatar_id=avatar.id,
            prompt=_prompt(avatar, custom_prompt),
            tier=tier.value,
            status=PENDING,
        )
        session.add(content)
        request = _request(content, avatar, QUALITY[tier], timeout_s)
        session.add(OutboxEntry(job_id=content.job_id, priority=QUALITY[tier].priority, request=request))
        return content


def conclude(session: Session, job_id: str, run: int, outcome: Outcome) -> bool:
    """Gives the content piece its outcome, and says whether it changed: not for an older run, nor the same one again.

    A later run has the last word: a dead letter that is replayed turns `failed` into `succeeded`.
    """
    values = {name: getattr(outcome, name) for name in Outcome.__dataclass_fields__}
    change = update(Content).where(Content.job_id == job_id, Content.run < run).values(run=run, **values)
    return session.execute(change.returning(Content.id)).first() is not None


def outcome_of(event: TerminalEvent) -> Outcome:
    """What an event of the queue says."""
    match event:
        case SucceededEvent(data=data):
            return Outcome(
                SUCCEEDED,
                image_url=data.image_url,
                image_key=data.image_key,
                image_sha256=data.image_sha256,
                seed=data.metadata.seed_used,
                timings=data.timings.model_dump(),
            )
        case FailedEvent(data=data):
            return Outcome(FAILED, error_code=data.error_code, error=_text(data.error), retry_after=data.retry_after)
        case CancelledEvent(data=data):
            return Outcome(CANCELLED, error_code=data.error_code)


def refusal(error: ProducerError) -> Outcome:
    """What it means that a request was not taken, and never will be."""
    return Outcome(FAILED, error_code=error.error_code, error=_text(str(error)), retry_after=error.retry_after)


def _prompt(avatar: Avatar, custom_prompt: str) -> str:
    trigger_word = avatar.lora_model.trigger_word if avatar.lora_model else ""
    return ", ".join(part for part in (trigger_word, avatar.base_prompt, custom_prompt) if part)


def _request(content: Content, avatar: Avatar, quality: Quality, timeout_s: float) -> dict[str, Any]:
    request: dict[str, Any] = {
        "job_id": content.job_id,
        "prompt": content.prompt,
        "width": quality.width,
        "height": quality.height,
        "steps": quality.steps,
        "timeout": min(math.ceil(timeout_s), _MAX_ATTEMPT_S),
        "expires_at": (datetime.now(UTC) + timedelta(seconds=timeout_s)).isoformat(),
        "metadata": {"content_id": content.id, "avatar_id": avatar.id},
    }
    if (lora := avatar.lora_model) is not None:
        request |= {"lora_key": lora.key} if lora.key else {"lora_url": lora.url}
        request |= {"lora_scale": lora.scale, "lora_version": lora.version}
    return request


def _text(value: str) -> str:
    return value.replace("\0", "")  # PostgreSQL keeps no NUL in text
