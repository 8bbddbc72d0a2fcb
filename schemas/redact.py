"""Removes signatures and credentials from any text that leaves the process.

A presigned URL's secret may sit in any parameter (SigV4 and SigV2 name theirs differently), so the whole query of every
URL goes, with its fragment and its userinfo. What remains still names the object.
"""

import re
from typing import Any
from urllib.parse import urlsplit, urlunsplit

REDACTED = "[redacted]"

# ASCII, since `redact_bytes` looks at UTF-8 one byte at a time: 0x85 and 0xA0 are no spaces there.
_FLAGS = re.IGNORECASE | re.ASCII
# In JSON text a slash may be written \/, and any character as its number. The scheme's length is bounded: a search for
# one in a long word would else begin anew at each of its letters.
_SEPARATOR = r"(?::|\\{1,8}u003a)(?:\\*(?:/|u002f)){2}"
_URL = re.compile(rf"[a-z][a-z0-9+.-]{{0,20}}{_SEPARATOR}[^\s\"'<>`]*", _FLAGS)
_USERINFO = re.compile(rf"({_SEPARATOR})[^/\\?#]*(?:@|\\{{1,8}}u0040)", _FLAGS)
# `reprlib`, and so asyncio, leaves out the middle of a long URL, its question mark with it.
_QUERY_AND_FRAGMENT = re.compile(r"(?:[?#]|\\u003f|\\u0023|\.\.\.).*", re.DOTALL | _FLAGS)

_NAMES = (
    r"(?:signature|credential|awsaccesskeyid|(?:secret|access)(?:[_-]?access)?[_-]?key(?:[_-]?id)?"
    r"|token|passw(?:or)?d|secret|authorization|(?<![a-z])sig)"
)
# A signed query that something has cut off its URL, and credentials written as key=value, in JSON or as a header.
_HEAD = rf"{_NAMES}(?:\\*[\"'])?\s*(?:[=:]|%(?:25)*3d|\\+u003d)\s*"
_VALUE = rf"(?:(?!{_HEAD})(?:[^\s\"'&,;}}\\]|\\(?![\"'])))+"  # ends where another secret begins
_NAMED_SECRET = re.compile(
    rf"(?P<head>{_HEAD})(?:(?P<quote>\\*[\"'])(?:(?!(?P=quote))[^\n])+|(?:(?:bearer|basic)\s+)?{_VALUE})", _FLAGS
)
# Credentials that are known without a name: a bearer token, a webhook secret.
_BARE_SECRET = re.compile(r"(?P<head>\bbearer\s+|whsec_)[A-Za-z0-9._~+/=-]{8,}", _FLAGS)
_NAME = re.compile(rf".*{_NAMES}", _FLAGS)


def redact_text(text: str) -> str:
    """Returns `text` with the query, fragment and userinfo of every URL removed, and other secrets replaced."""
    text = _URL.sub(lambda match: _QUERY_AND_FRAGMENT.sub("", _USERINFO.sub(r"\1", match[0])), text)
    text = _NAMED_SECRET.sub(lambda match: f"{match['head']}{match['quote'] or ''}{REDACTED}", text)
    return _BARE_SECRET.sub(lambda match: f"{match['head']}{REDACTED}", text)


def redact_bytes(raw: bytes) -> bytes:
    """`redact_text` for bytes in any encoding that extends ASCII: other bytes come back as they were.

    In UTF-16 and UTF-32 secrets stand between NULs: where there are any, the text comes back without its NULs.
    """
    text = raw.decode("latin-1")
    redacted, bare = redact_text(text), redact_text(text.replace("\0", ""))
    return (redacted if redacted.replace("\0", "") == bare else bare).encode("latin-1")


def redact_value(value: Any) -> Any:
    """Returns a copy of a JSON-like value with every string in it redacted; keys stay as they are."""
    match value:
        case str():
            return redact_text(value)
        case bytes():
            return redact_bytes(value)
        case dict():
            return {key: REDACTED if _is_secret(key, item) else redact_value(item) for key, item in value.items()}
        case list() | tuple():
            return [redact_value(item) for item in value]
        case BaseException():
            return redact_text(f"{type(value).__name__}: {value}")
        case _:
            return value


def _is_secret(key: Any, item: Any) -> bool:
    return isinstance(key, str) and isinstance(item, str | bytes) and _NAME.fullmatch(key) is not None


def without_query(url: str) -> str:
    """The part of a URL that may be shown and kept: scheme, host and path.

    Raises ValueError where `url` cannot be split.
    """
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
