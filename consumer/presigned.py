"""What a presigned URL says about its own lifetime, in either of S3's two query signatures."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qsl, urlsplit

from schemas.net.urls import ForbiddenUrl

MAX_LIFETIME_S = 604_800
MAX_CLOCK_SKEW = timedelta(minutes=15)  # what S3 itself grants a URL that is dated in the future


class LifetimeForbidden(ForbiddenUrl):
    """No store grants such a lifetime, whenever it is asked."""


@dataclass(frozen=True, slots=True)
class Lifetime:
    """`begins` is None for a SigV2 URL, which does not say when it was signed."""

    begins: datetime | None
    ends: datetime


def read_lifetime(url: str) -> Lifetime:
    """From when to when `url` may be used.

    Raises ForbiddenUrl where it is not presigned in such a way, LifetimeForbidden where it is for longer than
    `MAX_LIFETIME_S`.
    """
    pairs = parse_qsl(urlsplit(url).query, keep_blank_values=True)
    parameters = dict(pairs)
    if len(parameters) != len(pairs):
        raise ForbiddenUrl("a query parameter is given twice")
    try:
        if parameters.get("X-Amz-Signature"):
            return _read_v4(parameters["X-Amz-Date"], parameters["X-Amz-Expires"])
        if parameters.get("Signature"):
            return Lifetime(None, datetime.fromtimestamp(_digits(parameters["Expires"]), UTC))
    except (KeyError, ValueError, OverflowError):
        raise ForbiddenUrl("its date or its expiry cannot be read") from None
    raise ForbiddenUrl("it is not presigned")


def _read_v4(date: str, expires: str) -> Lifetime:
    begins = datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    lifetime_s = _digits(expires)
    if not 1 <= lifetime_s <= MAX_LIFETIME_S:
        raise LifetimeForbidden(f"it is valid for {lifetime_s} s, where 1 to {MAX_LIFETIME_S} are possible")
    return Lifetime(begins, begins + timedelta(seconds=lifetime_s))


def _digits(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 11):
        raise ValueError("not a number")
    return int(text)
