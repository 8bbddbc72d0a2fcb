"""The page that the demo leaves: every job with its picture or its error, in one file without scripts."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from demo.jobs import EndedJob, PlannedJob
from schemas.events import CancelledEvent, FailedEvent, SucceededData, SucceededEvent, Timings
from schemas.redact import redact_value
from schemas.requests import LoraRef

STAGES = ("queued", "prepare", "generate", "encode", "upload")

_TEMPLATES = Path(__file__).parent / "templates"
_DIGEST_CHARACTERS = 12


@dataclass(frozen=True, slots=True)
class Totals:
    """What the page says at its top. `took_s`: the whole demo, from its start."""

    took_s: float
    problems: Sequence[str] = ()


def render(ends: Sequence[EndedJob], totals: Totals) -> str:
    """The page, as HTML. Nothing in it comes from elsewhere: pictures are data URLs."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    longest_s = max(
        (end.event.data.timings.total for end in ends if isinstance(end.event, SucceededEvent)), default=0.0
    )
    groups = [
        (name, [_card(end, longest_s) for end in members]) for name, members in groupby(ends, lambda end: end.job.group)
    ]
    return environment.get_template("gallery.html.j2").render(
        groups=groups,
        facts=_facts(ends, totals),
        problems=redact_value(list(totals.problems)),
        stages=STAGES,
    )


def _facts(ends: Sequence[EndedJob], totals: Totals) -> list[tuple[str, str]]:
    pictures = [end.event.data for end in ends if isinstance(end.event, SucceededEvent)]
    drawing_s = sum(data.generation_time_seconds for data in pictures)
    facts = [
        ("jobs", str(len(ends))),
        ("pictures", str(len(pictures))),
        ("refused", str(sum(isinstance(end.event, FailedEvent) for end in ends))),
        ("in all", f"{totals.took_s:.1f} s"),
    ]
    if pictures:
        facts.append(("per picture", f"{drawing_s / len(pictures):.1f} s"))
        facts.append(("drawn on", ", ".join(sorted({data.gpu for data in pictures}))))
    return facts


def _card(end: EndedJob, longest_s: float) -> dict[str, Any]:
    source = f"data:image/png;base64,{b64encode(end.png).decode()}" if end.png else None
    return {**redact_value(_shown(end, longest_s)), "source": source}


def _shown(end: EndedJob, longest_s: float) -> dict[str, Any]:
    """What the template shows of a job, in plain values."""
    event = end.event
    card: dict[str, Any] = {
        "job_id": end.job.job_id,
        "title": end.job.title,
        "prompt": end.job.fields["prompt"],
        "negative_prompt": end.job.fields.get("negative_prompt", ""),
        "state": event.type.removeprefix("generation.") if event else "unknown",
        "event_id": event.id if event else None,
        "picture": None,
        "failure": None,
        "loras": _asked_loras(end.job),
        "parameters": _parameters(end),
    }
    match event:
        case SucceededEvent(data=data):
            card |= {
                "picture": _picture(data, longest_s),
                "loras": [lora.model_dump() for lora in data.model_info.loras],
            }
        case FailedEvent(data=data):
            card["failure"] = {
                "code": data.error_code.value,
                "error": data.error,
                "retry_after": data.retry_after,
            }
        case CancelledEvent(data=data):
            card["failure"] = {"code": data.error_code.value, "error": f"while {data.stage}", "retry_after": None}
    return card


def _parameters(end: EndedJob) -> dict[str, Any]:
    """What was used, or where nothing was drawn what was asked for."""
    fields = end.job.fields
    parameters = {"seed": fields.get("seed"), "steps": fields.get("steps"), "cfg": fields.get("cfg")}
    size = (fields.get("width"), fields.get("height"))
    if isinstance(end.event, SucceededEvent):
        used, size = end.event.data.metadata, end.event.data.image_size
        parameters = {"seed": used.seed_used, "steps": used.actual_steps, "cfg": used.actual_cfg}
    parameters["size"] = f"{size[0]} × {size[1]}" if all(size) else None
    return {name: value for name, value in parameters.items() if value is not None}


def _asked_loras(job: PlannedJob) -> list[dict[str, Any]]:
    """The LoRAs of a job that drew nothing."""
    url, key = job.fields.get("lora_url"), job.fields.get("lora_key")
    if url is None and key is None:
        return []
    ref = LoraRef(url=url, key=key, scale=job.fields.get("lora_scale", 1.0), version=job.fields.get("lora_version"))
    return [{"name": ref.name, "version": ref.version, "scale": ref.scale, "modules": None, "skipped": 0}]


def _picture(data: SucceededData, longest_s: float) -> dict[str, Any]:
    width, height = data.image_size
    return {
        "width": width,
        "height": height,
        "digest": data.image_sha256[:_DIGEST_CHARACTERS],
        "kilobytes": round(data.image_bytes / 1000),
        "key": data.image_key or "the caller's upload URL",
        "stages": _stages(data.timings, longest_s),
        "total_s": data.timings.total,
        "warnings": list(data.warnings),
    }


def _stages(timings: Timings, longest_s: float) -> list[dict[str, Any]]:
    """The stages of one job. `percent`: of the page's longest job, so that all bars have one scale."""
    seconds = timings.model_dump()
    return [
        {"name": name, "seconds": seconds[name], "percent": 100 * seconds[name] / longest_s if longest_s else 0.0}
        for name in STAGES
    ]
