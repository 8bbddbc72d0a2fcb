"""The kinds of value that a request is made of, each with its rule."""

import json
import re
import unicodedata
from datetime import UTC, datetime
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, AwareDatetime, BeforeValidator, Field, JsonValue
from pydantic_core import PydanticCustomError

from schemas import strict_json

MAX_METADATA_BYTES = 4 * 1024
SIDES = (512, 768, 1024, 1344, 1536)
PROMPT_ERROR = "invalid_prompt"

JOB_ID_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
_RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)", re.IGNORECASE | re.ASCII)
_URL = re.compile(r"[a-z][a-z0-9+.-]*:[!-\[\]-~]+", re.IGNORECASE | re.ASCII)  # printable, without the backslash


def is_job_id(value: object) -> bool:
    """Whether `value` may serve as a job's id."""
    return isinstance(value, str) and re.fullmatch(JOB_ID_PATTERN[1:-1], value) is not None


def refuse(kind: str, message: str) -> PydanticCustomError:
    """What a validator raises: `kind` for programs, `message` for people; neither repeats the input."""
    return PydanticCustomError(kind, message)


def _check_storable(value: str) -> str:
    if "\0" in value:
        raise refuse("nul", "has a NUL character")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise refuse("surrogate", "has a lone surrogate")
    return value


def _check_printable(prompt: str) -> str:
    for character in prompt:
        if unicodedata.category(character) == "Cc" and character not in "\n\t":
            raise refuse(PROMPT_ERROR, f"has the control character U+{ord(character):04X}")
    return prompt


def _check_prompt(prompt: str) -> str:
    # Cf holds the zero-width characters; combining marks alone draw nothing either.
    if all(character.isspace() or unicodedata.category(character) in ("Cf", "Cc", "Mn", "Me") for character in prompt):
        raise refuse(PROMPT_ERROR, "is blank")
    return _check_printable(prompt)


def _check_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        has_userinfo = "@" in parts.netloc
        _ = parts.port  # raises where the port is no port
    except ValueError:
        raise refuse("url", "is not a URL") from None
    if not _URL.fullmatch(url) or (parts.scheme in ("http", "https") and not parts.hostname):
        raise refuse("url", "is not a URL")
    if has_userinfo:
        raise refuse("url", "has userinfo")
    return url


def _check_object_key(key: str) -> str:
    if ".." in key or key.startswith("/") or any(unicodedata.category(character) == "Cc" for character in key):
        raise refuse("object_key", "is not an object key: no '..', no leading '/', no control characters")
    if "://" in key:  # with its signature, perhaps, and nobody takes signatures out of keys
        raise refuse("object_key", "is a URL, and no object key")
    if len(key.encode()) > 1024:
        raise refuse("object_key", "is longer than 1024 bytes")
    return key


def _check_side(side: int) -> int:
    if side not in SIDES:
        raise refuse("side", f"must be one of {', '.join(map(str, SIDES))}")
    return side


def _check_metadata(metadata: dict[str, JsonValue]) -> dict[str, JsonValue]:
    try:
        strict_json.check(metadata, strict_json.MAX_DEPTH - 1)
    except strict_json.StrictJsonError as error:
        raise refuse("metadata", str(error)) from None
    text = json.dumps(metadata, ensure_ascii=False, separators=(",", ":"))
    if len(text.encode()) > MAX_METADATA_BYTES:
        raise refuse("metadata", f"is larger than {MAX_METADATA_BYTES} bytes")
    if "\\u0000" in text.replace("\\\\", ""):
        raise refuse("metadata", "has a NUL character")
    return metadata


def _read_rfc3339(value: object) -> object:
    # pydantic alone would also read unix times written as strings
    if not isinstance(value, str):
        return value
    if not _RFC3339.fullmatch(value):
        raise refuse("time", "is not an RFC 3339 time")
    try:
        return datetime.fromisoformat(value.upper())
    except ValueError:
        raise refuse("time", "is not an RFC 3339 time") from None


def _in_utc(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise refuse("time", "is out of range") from None


Time = Annotated[AwareDatetime, BeforeValidator(_read_rfc3339), AfterValidator(_in_utc)]
Text = Annotated[str, AfterValidator(_check_storable)]
Url = Annotated[str, AfterValidator(_check_url)]
ObjectKey = Annotated[str, Field(min_length=1), AfterValidator(_check_object_key)]
Scale = Annotated[float, Field(ge=0.0, le=1.0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")]
JobId = Annotated[str, Field(pattern=JOB_ID_PATTERN)]
Prompt = Annotated[str, Field(max_length=4000), AfterValidator(_check_prompt)]
NegativePrompt = Annotated[str, Field(max_length=4000), AfterValidator(_check_printable)]
Metadata = Annotated[dict[str, JsonValue], AfterValidator(_check_metadata)]
Side = Annotated[int, AfterValidator(_check_side), Field(json_schema_extra={"enum": list(SIDES)})]
