"""The contract as documents that other languages read: JSON Schema 2020-12 and AsyncAPI 3.0."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from schemas.events import CancelledEvent, FailedEvent, RetryingEvent, StartedEvent, SucceededEvent
from schemas.field_notes import FIELD_NOTES
from schemas.fields import JOB_ID_PATTERN
from schemas.keys import CONSUMER_GROUP, DEFAULT_LISTENER_GROUP, DEFAULT_PREFIX, Keys, Priority
from schemas.requests import MAX_PAYLOAD_BYTES, VERSION, GenerationRequest

ASYNCAPI = "asyncapi.json"
EXAMPLES = "examples"
REQUEST = "request"
EVENTS: dict[str, type[BaseModel]] = {
    "generation.started": StartedEvent,
    "generation.retrying": RetryingEvent,
    "generation.succeeded": SucceededEvent,
    "generation.failed": FailedEvent,
    "generation.cancelled": CancelledEvent,
}

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_TEXT = {"type": "string"}
_JOB_ID = {"type": "string", "pattern": JOB_ID_PATTERN}
_DIGITS = {"type": "string", "pattern": "^[0-9]+$"}
# In AsyncAPI braces mark a parameter, so the hash tag, which has braces of its own, is one.
_HASH_TAG = {
    "default": f"{{{DEFAULT_PREFIX}}}",
    "description": "The key prefix (SDXL_PREFIX) in literal braces: a Redis hash tag, so that all keys share one slot.",
}
_INFO = """\
Requests for pictures go into three Redis streams, and events come out of one, as seen by the GPU consumers.

A stream entry's `payload` field holds JSON and is the message's payload here; its other fields are the message's \
headers. README.md beside this file is the contract in full."""
_REQUESTS = f"""\
Redis stream, {{}} priority. Publish with XADD <address> * payload <JSON> [job_id <id>] [run <n>] [traceparent <W3C>]. \
Never trim it. Consumers read it as the group `{CONSUMER_GROUP}` (created at id 0 with MKSTREAM), and delete an entry \
when its run has ended."""
_COMPLETIONS = f"""\
Redis stream of events. Read it with XREADGROUP as a group of your own (created at id 0 with MKSTREAM; the project's \
listener uses `{DEFAULT_LISTENER_GROUP}`) and XACK what you have stored. It is trimmed only below what every group has \
acknowledged."""
_DEAD = """\
Redis stream of dead letters: failed runs that could succeed if they were run again, and entries from which no job_id \
can be read. Nothing trims it."""
_PROGRESS = """\
Redis stream of one job, capped and expiring. Read it with XREAD from id 0: steps, then a copy of the terminal event."""


def documents(folder: Path) -> dict[str, str]:
    """Every exported document by its name in `folder`, from which the recorded examples are taken.

    Raises ValueError where an example is not JSON.
    """
    exported = {_schema_name(REQUEST): model_schema(GenerationRequest)}
    exported |= {_schema_name(name): model_schema(model) for name, model in EVENTS.items()}
    exported[ASYNCAPI] = _asyncapi(_read_examples(folder / EXAMPLES))
    return {name: json.dumps(value, indent=2, ensure_ascii=False) + "\n" for name, value in exported.items()}


def model_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema of what travels: of a request as it is read, of an event as it is written."""
    is_request = model is GenerationRequest
    schema: dict[str, Any] = {"$schema": _DIALECT}
    schema |= model.model_json_schema(mode="validation" if is_request else "serialization")
    parts = schema.get("$defs", {})
    for name, part in {model.__name__: schema, **parts}.items():
        for field, rule in part.get("properties", {}).items():
            _annotate(name, field, rule)
    if is_request:
        schema["properties"]["prompt"]["minLength"] = 1
        schema["allOf"] = [
            _not_both("lora_url", "lora_key"),
            _not_both("lora_url", "loras"),
            _not_both("lora_key", "loras"),
            _not_both("upload_url", "output_key"),
        ]
        parts["LoraRef"]["oneOf"] = [_given("url"), _given("key")]
    return schema


def _annotate(model: str, field: str, rule: dict[str, Any]) -> None:
    rule["description"] = FIELD_NOTES.get(f"{model}.{field}") or FIELD_NOTES[field]
    if field == "url" or field.endswith("_url"):
        rule["anyOf"][0]["format"] = "uri"
    if field == "timestamp":
        rule["format"] = "date-time"


def _given(*fields: str) -> dict[str, Any]:
    rules = {field: {"minItems": 1} if field == "loras" else {"type": "string"} for field in fields}
    return {"properties": rules, "required": list(fields)}


def _not_both(one: str, other: str) -> dict[str, Any]:
    return {"not": _given(one, other)}


def _schema_name(message: str) -> str:
    return f"{message}.schema.json"


def _read_examples(folder: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_bytes()) for path in sorted(folder.glob("*.json"))}


def _asyncapi(examples: dict[str, Any]) -> dict[str, Any]:
    channels = _channels()
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "modal-sdxl-lora", "version": f"{VERSION}.0.0", "description": _INFO},
        "defaultContentType": "application/json",
        "servers": {
            "redis": {
                "host": "localhost:6379",
                "protocol": "redis",
                "description": "Redis 6.2 or newer (REDIS_URL; rediss:// for TLS), with maxmemory-policy noeviction.",
            }
        },
        "channels": channels,
        "operations": {
            f"{'receive' if action == 'receive' else 'publish'}{channel[0].upper()}{channel[1:]}": {
                "action": action,
                "channel": {"$ref": f"#/channels/{channel}"},
                "summary": summary,
            }
            for channel, (action, summary) in _OPERATIONS.items()
        },
        "components": {"messages": _messages(examples)},
    }


_OPERATIONS = {
    "requestsHigh": ("receive", "Takes urgent requests, before the others."),
    "requestsNormal": ("receive", "Takes requests."),
    "requestsLow": ("receive", "Takes requests that can wait; they keep a small share under load."),
    "completions": ("send", "Says what became of a run."),
    "dead": ("send", "Sets aside what might succeed if it were run again."),
    "progress": ("send", "Says how far a job is."),
}


def _channels() -> dict[str, Any]:
    keys = Keys("hashTag")  # its addresses have the parameter where others have the prefix
    tag: dict[str, Any] = {"hashTag": _HASH_TAG}
    job = {"jobId": {"description": "The request's `job_id`."}}
    channels = {
        f"requests{priority.capitalize()}": _channel(
            keys.requests(priority), _REQUESTS.format(priority), [REQUEST], tag
        )
        for priority in Priority
    }
    return channels | {
        "completions": _channel(keys.completions, _COMPLETIONS, list(EVENTS), tag),
        "dead": _channel(keys.dead, _DEAD, ["deadLetter", "undecodable"], tag),
        "progress": _channel(keys.progress("{jobId}"), _PROGRESS, ["step", *_terminal()], tag | job),
    }


def _terminal() -> list[str]:
    return ["generation.succeeded", "generation.failed", "generation.cancelled"]


def _channel(address: str, description: str, messages: list[str], parameters: dict[str, Any]) -> dict[str, Any]:
    return {
        "address": address,
        "description": description,
        "servers": [{"$ref": "#/servers/redis"}],
        "parameters": parameters,
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in messages},
    }


def _messages(examples: dict[str, Any]) -> dict[str, Any]:
    request = {
        "name": REQUEST,
        "title": "A picture to make",
        "summary": f"At most {MAX_PAYLOAD_BYTES} bytes of JSON.",
        "headers": _entry_fields({"job_id": _JOB_ID, "run": _DIGITS, "traceparent": _TEXT}, required=[]),
    }
    messages = {REQUEST: request | _json_payload(REQUEST, examples)}
    for name, model in EVENTS.items():
        headers = _entry_fields({"type": {"const": name, "type": "string"}, "job_id": _JOB_ID})
        event = {"name": name, "title": model.__name__, "summary": model.__doc__, "headers": headers}
        messages[name] = event | _json_payload(name, examples)
    dead = dict.fromkeys(("payload", "event", "source"), _TEXT) | dict.fromkeys(("run", "attempts", "died_at"), _DIGITS)
    undecodable = {"raw": _TEXT, "source": _TEXT, "died_at": _DIGITS}
    step = {"step": _DIGITS, "total": _DIGITS, "eta_s": _TEXT}
    return messages | {
        "deadLetter": _bare("A failed run that may be replayed; URLs without their query", {"job_id": _JOB_ID, **dead}),
        "undecodable": _bare("An entry without a readable job_id; `raw` without the queries of its URLs", undecodable),
        "step": _bare("One step of denoising done", step)
        | {"examples": [{"name": "step", "payload": {"step": "7", "total": "28", "eta_s": "0.612"}}]},
    }


def _json_payload(message: str, examples: dict[str, Any]) -> dict[str, Any]:
    recorded = [
        {"name": name, "payload": example}
        for name, example in examples.items()
        if name == message or name.startswith(f"{message}.")
    ]
    payload = {"payload": {"$ref": f"./{_schema_name(message)}"}}
    return {"contentType": "application/json", **payload, **({"examples": recorded} if recorded else {})}


def _bare(summary: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {"summary": f"{summary}. The entry's own fields.", "payload": _entry_fields(fields)}


def _entry_fields(fields: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    needed = list(fields) if required is None else required
    described = {name: {**rule, "description": FIELD_NOTES[f"entry.{name}"]} for name, rule in fields.items()}
    return {"type": "object", "properties": described, **({"required": needed} if needed else {})}
