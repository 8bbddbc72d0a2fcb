"""Signatures after Standard Webhooks (https://www.standardwebhooks.com): HMAC-SHA256 over `id.timestamp.body`."""

import base64
import binascii
from collections.abc import Sequence
from datetime import UTC, datetime

from standardwebhooks import Webhook

_PREFIX = "whsec_"
_MIN_BYTES, _MAX_BYTES = 24, 64


class BadSecret(ValueError):
    """A text that holds no webhook secrets. The message never repeats it."""


def read_secrets(texts: str | Sequence[str]) -> tuple[Webhook, ...]:
    """The secrets in `texts`, in their order: `whsec_` and the base64 of 24 to 64 bytes, separated by commas.

    Raises BadSecret where one of them is none, or there is none.
    """
    joined = texts if isinstance(texts, str) else ",".join(texts)
    parts = [part.strip() for part in joined.split(",") if part.strip()]
    if not parts:
        raise BadSecret("there is no secret")
    return tuple(Webhook(_key(part, f"secret {number} of {len(parts)}")) for number, part in enumerate(parts, 1))


def signed_headers(secrets: Sequence[Webhook], event_id: str, body: bytes, at: datetime) -> dict[str, str]:
    """The headers of one attempt: its id, its time in seconds, and a signature by each of the secrets."""
    text, at = body.decode(), at.astimezone(UTC)  # the library takes the clock's face for UTC
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": " ".join(secret.sign(event_id, at, text) for secret in secrets),
    }


def _key(text: str, name: str) -> bytes:
    encoded = text.removeprefix(_PREFIX).rstrip("=")
    try:
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise BadSecret(f"{name} is not base64") from None
    if not _MIN_BYTES <= len(key) <= _MAX_BYTES:
        raise BadSecret(f"{name} has {len(key)} bytes: a webhook secret has {_MIN_BYTES} to {_MAX_BYTES}")
    return key
