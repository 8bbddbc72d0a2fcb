"""What the demo asks for: each way in which a LoRA may come, and two requests that cannot succeed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from producer.storage import PresignedUrls
from schemas.errors import ErrorCode
from schemas.events import TerminalEvent

AURORA, EMBER, INKWASH = (f"loras/{name}.safetensors" for name in ("aurora", "ember", "inkwash"))
ONE_SEED = "One prompt, one seed"
WAYS = "Other sizes, other ways in and out"
REFUSED = "Refused, as planned"

_SMALL = {"width": 512, "height": 512, "steps": 20}
_LIGHTHOUSE = {**_SMALL, "prompt": "an old lighthouse by the sea at sunset, watercolor", "seed": 7}


@dataclass(frozen=True, slots=True)
class PlannedJob:
    """One job, and how it is to end. `fields`: the request as it is submitted, with whatever signs its URLs.

    `error_code`: the failure that is meant to happen, None for a picture. `by_hand`: added to the stream with a bare
    XADD, as a backend in any language would.
    """

    job_id: str
    group: str
    title: str
    fields: Mapping[str, Any] = field(repr=False)
    error_code: ErrorCode | None = None
    by_hand: bool = False


@dataclass(frozen=True, slots=True)
class EndedJob:
    """A job and what became of it. `event` is None where none arrived, `png` where there is no picture."""

    job: PlannedJob
    event: TerminalEvent | None
    png: bytes | None = field(default=None, repr=False)


def plan(urls: PresignedUrls) -> tuple[PlannedJob, ...]:
    """The demo's jobs, in the order of their submission, with URLs that are signed now."""
    return (*_one_seed(urls), *_other_ways(urls), *_refused(urls))


def _one_seed(urls: PresignedUrls) -> list[PlannedJob]:
    both = [{"url": urls.lora_url(AURORA), "scale": 0.6}, {"key": EMBER, "scale": 0.6}]
    variants: list[tuple[str, str, dict[str, Any]]] = [
        ("lighthouse", "The base model alone", {}),
        (
            "lighthouse-peft",
            "A PEFT LoRA behind a signed URL",
            {"lora_url": urls.lora_url(AURORA), "lora_version": "v1"},
        ),
        (
            "lighthouse-peft-faint",
            "The same LoRA at a lower scale",
            {"lora_url": urls.lora_url(AURORA), "lora_scale": 0.4, "lora_version": "v1"},
        ),
        ("lighthouse-kohya", "A kohya LoRA behind a signed URL", {"lora_url": urls.lora_url(EMBER)}),
        ("lighthouse-encoders", "A kohya LoRA with text-encoder parts, by its key", {"lora_key": INKWASH}),
        ("lighthouse-both", "PEFT and kohya at once, one by URL, one by key", {"loras": both}),
    ]
    return [PlannedJob(job_id, ONE_SEED, title, {**_LIGHTHOUSE, **extra}) for job_id, title, extra in variants]


def _other_ways(urls: PresignedUrls) -> list[PlannedJob]:
    handed_over: dict[str, Any] = {
        "prompt": "mountains in the mist, long exposure photograph",
        "seed": 11,
        "upload_url": urls.upload_url("handed-over/mountains.png"),
    }
    wide: dict[str, Any] = {
        "prompt": "a city at night under rain, cinematic light",
        "seed": 21,
        "width": 768,
        "lora_key": EMBER,
        "lora_scale": 0.5,
    }
    negative: dict[str, Any] = {
        "prompt": "a garden of white flowers in spring, soft light",
        "negative_prompt": "dark, blurry, smoke",
        "cfg": 9.0,
        "seed": 31,
    }
    chosen_key: dict[str, Any] = {
        "prompt": "a quiet forest in autumn, oil painting",
        "output_key": "galleries/autumn/forest.png",
        "metadata": {"order": 1042},
    }
    ways = [
        ("mountains-upload-url", "Stored through the caller's own upload URL", handed_over),
        ("city-wide", "768 × 512, with a LoRA by its key", wide),
        ("garden-negative", "A negative prompt and a strong guidance", negative),
        ("forest-chosen-key", "An object key of the caller's choice, a seed of the service's", chosen_key),
    ]
    return [PlannedJob(job_id, WAYS, title, {**_SMALL, **fields}) for job_id, title, fields in ways]


def _refused(urls: PresignedUrls) -> list[PlannedJob]:
    return [
        PlannedJob(
            "dead-link",
            REFUSED,
            "A LoRA that is no longer there",
            {**_LIGHTHOUSE, "lora_url": urls.lora_url("loras/deleted-last-week.safetensors")},
            error_code=ErrorCode.LORA_DOWNLOAD_FAILED,
        ),
        PlannedJob(
            "too-many-steps",
            REFUSED,
            "A request outside the contract, added with a bare XADD",
            {**_LIGHTHOUSE, "v": 1, "steps": 500},
            error_code=ErrorCode.INVALID_REQUEST,
            by_hand=True,
        ),
    ]
