"""A dead letter: what can be read of one, and which of them are meant."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import unquote

from producer.queue import StreamEntry
from producer.stream_ids import stream_time, time_of_ms
from schemas.entries import decode_entry
from schemas.errors import ErrorCode
from schemas.events import Event, EventError, FailedEvent, decode_event
from schemas.keys import Priority
from schemas.requests import GenerationRequest

_MAX_DIGITS = 16


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One entry of the dead letters, as far as it can be read.

    `request` is the run's request without its URLs' queries, as `payload` has it in bytes; `event` is the run's
    terminal event. An entry without a readable job has only `raw`.
    """

    entry_id: str
    job_id: str | None
    run: int | None
    request: GenerationRequest | None
    payload: bytes | None
    event: Event | None
    raw: bytes | None
    attempts: int | None
    source: str | None
    died_at: datetime

    @property
    def error_code(self) -> ErrorCode | None:
        """Why the run failed, None where the letter does not say."""
        return self.event.data.error_code if isinstance(self.event, FailedEvent) else None

    @property
    def error(self) -> str | None:
        """The failure in words, None where the letter does not say."""
        return self.event.data.error if isinstance(self.event, FailedEvent) else None

    @property
    def priority(self) -> Priority:
        """The priority of the stream that the job came from."""
        name = (self.source or "").rpartition(":")[2]
        return Priority(name) if name in tuple(Priority) else Priority.NORMAL


def decode_dead_letter(entry: StreamEntry) -> DeadLetter:
    """Reads a dead letter, whatever is in it."""
    fields = entry.fields
    died_at_ms = _number(fields.get(b"died_at"))
    read = decode_entry(fields)
    return DeadLetter(
        entry_id=entry.entry_id,
        job_id=read.job_id,
        run=_number(fields.get(b"run")),
        request=read.request,
        payload=fields.get(b"payload"),
        event=_event(fields.get(b"event")),
        raw=fields.get(b"raw"),
        attempts=_number(fields.get(b"attempts")),
        source=_text(fields.get(b"source")),
        died_at=stream_time(entry.entry_id) if died_at_ms is None else time_of_ms(died_at_ms),
    )


@dataclass(frozen=True, slots=True)
class LetterFilter:
    """Which dead letters are meant: those that fit all that is given; `LetterFilter()` is every one.

    `error_codes`: any of them. `died_before` and `died_after` are aware times. `lora` is part of the object key or of
    the URL (without its query) of any of the request's LoRAs; `text` is part of the error, in upper or lower case.
    Raises ValueError for an empty text, which would mean more than its writer thought, and for a naive time.
    """

    error_codes: Collection[ErrorCode] = ()
    died_before: datetime | None = None
    died_after: datetime | None = None
    tenant: str | None = None
    lora: str | None = None
    text: str | None = None
    job_id: str | None = None

    def __post_init__(self) -> None:
        for name in ("tenant", "lora", "text", "job_id"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} is empty")
        for name in ("died_before", "died_after"):
            time = getattr(self, name)
            if time is not None and time.utcoffset() is None:
                raise ValueError(f"{name} has no time zone")

    def fits(self, letter: DeadLetter) -> bool:
        """Whether the letter is meant."""
        request = letter.request
        return (
            (not self.error_codes or letter.error_code in self.error_codes)
            and (self.died_before is None or letter.died_at < self.died_before)
            and (self.died_after is None or letter.died_at > self.died_after)
            and (self.tenant is None or (request is not None and request.tenant == self.tenant))
            and (self.lora is None or (request is not None and _names_lora(request, self.lora)))
            and (self.text is None or self.text.casefold() in (letter.error or "").casefold())
            and (self.job_id is None or letter.job_id == self.job_id)
        )


def _names_lora(request: GenerationRequest, part: str) -> bool:
    return any(part in lora.source or part in unquote(lora.source) for lora in request.lora_refs)


def _event(payload: bytes | None) -> Event | None:
    try:
        return decode_event(payload) if payload is not None else None
    except EventError:
        return None


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "replace")


def _number(value: bytes | None) -> int | None:
    return int(value) if value is not None and value.isdigit() and len(value) <= _MAX_DIGITS else None
