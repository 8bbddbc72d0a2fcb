"""Removes signatures and credentials from any text that leaves the process.

A presigned URL's secret may sit in any parameter (SigV4 and SigV2 name theirs differently), so the whole query of every
URL goes, with its fragment and its userinfo. What remains still names the object.
"""

import re
from typing import Any
from urllib.parse import urlsplit, urlunsplit

REDACTED = "[redacted]"

# In JSON text a slash may be written \/, so the separator allows for backslashes.
_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*:(?:\\*/){2})(?P<rest>[^\s\"'<>`]*)", re.IGNORECASE)
_USERINFO = re.compile(r"^[^/?#\\]*@")
_QUERY_AND_FRAGMENT = re.compile(r"[?#].*$", re.DOTALL)
# A signed query that something has cut off its URL, and credentials written as key=value or as a header.
_LOOSE_SECRET = re.compile(
    r"(?P<name>x-amz-(?:signature|credential|security-token)|(?<![a-z])(?:signature|awsaccesskeyid|token|password|secret)"
    r"|authorization)(?P<sep>[\"']?\s*(?:=|:|%3d)\s*[\"']?)(?:(?:bearer|basic)\s+)?[^\s\"'&,;}]+",
    re.IGNORECASE,
)


def _clean_url(match: re.Match[str]) -> str:
    return match["scheme"] + _QUERY_AND_FRAGMENT.sub("", _USERINFO.sub("", match["rest"]))


def redact_text(text: str) -> str:
    """Returns `text` with the query, fragment and userinfo of every URL removed, and loose secrets replaced."""
    text = _URL.sub(_clean_url, text)
    return _LOOSE_SECRET.sub(lambda match: f"{match['name']}{match['sep']}{REDACTED}", text)


def redact_bytes(raw: bytes) -> bytes:
    """`redact_text` for bytes in any encoding: bytes that are not ASCII come back as they were."""
    return redact_text(raw.decode("latin-1")).encode("latin-1")


def redact_value(value: Any) -> Any:
    """Returns a copy of a JSON-like value with every string in it redacted; keys stay as they are."""
    match value:
        case str():
            return redact_text(value)
        case bytes():
            return redact_bytes(value)
        case dict():
            return {key: redact_value(item) for key, item in value.items()}
        case list() | tuple():
            return [redact_value(item) for item in value]
        case BaseException():
            return redact_text(f"{type(value).__name__}: {value}")
        case _:
            return value


def without_query(url: str) -> str:
    """The part of a URL that may be shown and kept: scheme, host and path.

    Raises ValueError where `url` cannot be split.
    """
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
