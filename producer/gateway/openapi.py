"""The OpenAPI document where FastAPI cannot know better: bodies are checked by the contract's own rules alone."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from producer.errors import ClientErrorCode
from producer.gateway.answers import ErrorAnswer
from producer.gateway.bodies import SYNCHRONOUS_FIELDS
from producer.gateway.errors import AnyCode, GatewayErrorCode
from schemas.errors import ErrorCode
from schemas.export import model_schema
from schemas.field_notes import FIELD_NOTES
from schemas.requests import GenerationRequest

_ERRORS: dict[int, tuple[str, AnyCode, int | None]] = {
    400: ("The caller's mistake", ErrorCode.INVALID_REQUEST, None),
    401: ("No token, or a wrong one", GatewayErrorCode.UNAUTHORIZED, None),
    404: ("Nothing is known of this job", ClientErrorCode.JOB_UNKNOWN, None),
    408: ("The body did not come in time", GatewayErrorCode.REQUEST_TIMEOUT, 0),
    409: ("Another body has this key, or somebody cancelled the job", ClientErrorCode.JOB_CONFLICT, None),
    413: ("The body is larger than 64 KiB", GatewayErrorCode.PAYLOAD_TOO_LARGE, None),
    415: ("The body is not JSON", GatewayErrorCode.UNSUPPORTED_MEDIA_TYPE, None),
    429: ("Too many jobs wait", ClientErrorCode.QUEUE_FULL, 30),
    500: ("The job failed on the GPU, or a defect", ErrorCode.GENERATION_FAILED, 30),
    502: ("The storage failed", ErrorCode.UPLOAD_FAILED, 60),
    503: ("Redis, the model or the GPU's memory is out of reach for now", GatewayErrorCode.UNAVAILABLE, 5),
    504: ("No picture within the call's time", ErrorCode.TIMEOUT, 0),
}
_CONTROLS = r"\u0000-\u0008\u000b-\u001f\u007f-\u009f"
_INVISIBLE = r"\s\u00ad\u0300-\u036f\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff"
_PROMPT = f"^[^{_CONTROLS}]*[^{_CONTROLS}{_INVISIBLE}][^{_CONTROLS}]*$"
_NEGATIVE_PROMPT = f"^[^{_CONTROLS}]*$"
_TEXT = r"^[^\u0000]*$"
_URL = r"^[A-Za-z][A-Za-z0-9+.-]*:[!-\[\]-~]+$"
_KEY = r"^[^/\u0000-\u001f\u007f-\u009f][^\u0000-\u001f\u007f-\u009f]*$"
# OpenAPI 3.0 knows no patternProperties: what needs them stands beside its own schemas, where a $ref may point to.
_BESIDE = "x-schemas"
_JSON = {"$ref": f"#/{_BESIDE}/MetadataValue"}
_OBJECT = {"type": "object", "additionalProperties": _JSON, "patternProperties": {r"\u0000": {"not": {}}}}
_METADATA = {**_OBJECT, "description": FIELD_NOTES["GenerationRequest.metadata"]}
_METADATA_VALUE = {
    "description": "Any JSON; its texts have no NUL character.",
    "nullable": True,
    "anyOf": [
        {"type": "string", "pattern": _TEXT},
        {"type": "number"},
        {"type": "boolean"},
        {"type": "array", "items": _JSON},
        _OBJECT,
    ],
}
_TEXT_FIELDS = ("lora_version", "version", "tenant")

_PLAIN = {"prompt": "a portrait, soft light"}
_WITH_LORA = {
    "prompt": "a portrait of ann, soft light",
    "negative_prompt": "blurry",
    "lora_url": "https://files.example/loras/ann.safetensors?X-Amz-Expires=600&X-Amz-Signature=3d5e",
    "lora_scale": 0.8,
    "width": 768,
    "height": 1344,
    "steps": 30,
    "cfg": 6.5,
    "seed": 7,
    "timeout": 90,
}
_WHOLE = {
    "prompt": "a portrait of ann, soft light",
    "lora_key": "loras/ann.safetensors",
    "tenant": "studio-7",
    "metadata": {"order": 1041},
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: _error(*_ERRORS[status]) for status in statuses}


def _error(meaning: str, code: AnyCode, retry_after: int | None) -> dict[str, Any]:
    example: dict[str, Any] = {"error": meaning, "error_code": code, "details": {}, "retry_after": retry_after}
    schema = {"$ref": f"#/components/schemas/{ErrorAnswer.__name__}"}  # a model would be said to be an event stream
    return {"description": meaning, "content": {"application/json": {"schema": schema, "example": example}}}


ALWAYS = _errors(401, 500, 503)
UNKNOWN = _errors(404)
SUBMISSION = _errors(400, 408, 409, 413, 415, 429)
WAITING = _errors(502, 504)
EVENT_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events `progress`, and last `generation.succeeded|failed|cancelled`, or `problem`",
        "content": {
            "text/event-stream": {
                "example": 'event: progress\ndata: {"step": 7, "total": 28, "eta_s": 0.612}\nid: 1.7\n\n'
            }
        },
    },
    204: {"description": "`Last-Event-ID` was the last event"},
}


def _body(schema: dict[str, Any], **examples: dict[str, Any]) -> dict[str, Any]:
    named = {name: {"value": value} for name, value in examples.items()}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema, "examples": named}}}}


def _whole_schema() -> dict[str, Any]:
    """The contract's schema of a request, with what it leaves to prose said in patterns."""
    schema = model_schema(GenerationRequest)
    lora = schema.pop("$defs")["LoraRef"]
    fields: dict[str, Any] = schema["properties"]
    fields["loras"]["items"] = lora
    fields["loras"]["uniqueItems"] = True
    fields["metadata"] = {"$ref": f"#/{_BESIDE}/Metadata"}
    fields["job_id"] = {"anyOf": [fields["job_id"], {"type": "null"}], "default": None}
    fields["prompt"]["pattern"] = _PROMPT
    fields["negative_prompt"]["pattern"] = _NEGATIVE_PROMPT
    for name, rule in [*fields.items(), *lora["properties"].items()]:
        _specify(name, rule)
    schema["required"] = ["prompt"]
    del schema["$schema"], schema["title"]
    return schema


def _specify(name: str, rule: dict[str, Any]) -> None:
    """Says of a text or null what the text has to look like."""
    if name in _TEXT_FIELDS:
        rule["anyOf"][0]["pattern"] = _TEXT
    elif name == "url" or name.endswith("_url"):
        rule["anyOf"][0] = {"type": "string", "pattern": _URL}
    elif name == "key" or name.endswith("_key"):
        rule["anyOf"][0] |= {"pattern": _KEY, "maxLength": 1024, "not": {"pattern": r"\.\."}}


def _synchronous_schema() -> dict[str, Any]:
    fields = _whole_schema()["properties"]
    return {
        "type": "object",
        "properties": {name: fields[name] for name in SYNCHRONOUS_FIELDS},
        "required": ["prompt"],
        "additionalProperties": False,
    }


JOB_BODY = _body(_whole_schema(), plain=_PLAIN, whole=_WHOLE)
SYNCHRONOUS_BODY = _body(_synchronous_schema(), plain=_PLAIN, lora=_WITH_LORA)


def install(app: FastAPI) -> None:
    """Replaces the application's document by one in OpenAPI 3.0: an integer is none there if it is written 28.0."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            found: dict[str, Any] = _in_3_0(
                get_openapi(
                    title=app.title,
                    version=app.version,
                    description=app.description,
                    routes=app.routes,
                    openapi_version="3.0.3",
                )
            )
            schemas = found["components"]["schemas"]
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            for path in found["paths"].values():
                for operation in path.values():
                    _correct(operation, schemas)
            for schema in schemas.values():
                _complete(schema, schema)
            found[_BESIDE] = {"Metadata": _METADATA, "MetadataValue": _METADATA_VALUE}
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # the way that FastAPI documents


def _correct(operation: dict[str, Any], schemas: dict[str, Any]) -> None:
    """Takes out what FastAPI says by itself, and a parameter that may be left out is not one that may be null."""
    operation["responses"].pop("422", None)
    for said in operation["responses"].values():
        for content in said.get("content", {}).values():
            name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
            _complete(content, schemas.get(name, {}))
    for parameter in operation.get("parameters", ()):
        parameter["schema"].pop("nullable", None)


def _complete(owner: dict[str, Any], schema: dict[str, Any]) -> None:
    """Puts back the nulls that FastAPI takes out of examples."""
    if "example" in owner and "required" in schema:
        owner["example"] = dict.fromkeys(schema["required"]) | owner["example"]


def _in_3_0(node: Any) -> Any:
    """A part of a document in OpenAPI 3.1, as 3.0 says it."""
    if isinstance(node, list):
        return [_in_3_0(item) for item in node]
    if not isinstance(node, dict):
        return node
    said = {name: _in_3_0(item) for name, item in node.items() if name != "itemSchema"}
    if isinstance(said.get("examples"), list):
        said["example"] = said.pop("examples")[0]
    if "const" in said:
        said["enum"] = [said.pop("const")]
    if "prefixItems" in said:
        said["items"] = said.pop("prefixItems")[0]
    choices = said.get("anyOf", [])
    if {"type": "null"} in choices:
        others = [choice for choice in choices if choice != {"type": "null"}]
        del said["anyOf"]
        said |= {"nullable": True} | (others[0] if len(others) == 1 and "$ref" not in others[0] else {"anyOf": others})
    return said
