"""The receiver's half: is this request from us, and what does it say? Needs neither Redis nor a database."""

import re
from collections.abc import Mapping, Sequence

from standardwebhooks import WebhookVerificationError

from producer.webhooks.signing import read_secrets
from schemas.events import Event, EventError, decode_event

# The library takes what `float` takes, and signs it rounded: one signature would be good for many writings of a time.
_SECONDS = re.compile(r"[1-9][0-9]{0,11}")


class WebhookRefused(Exception):
    """A request that no secret of ours has signed in the last minutes, or whose body is no event."""


def verify(body: bytes, headers: Mapping[str, str], secrets: str | Sequence[str]) -> Event:
    """The event that a webhook carries, once one of `secrets` is known to have signed it.

    `body` is the request's own bytes: parsed and written anew, it would not match. `headers` may be in any case.
    `secrets` is what WEBHOOK_SECRET holds, or a list of such. A signature is good for five minutes before and after its
    time. Deliver an event once: remember `event.id`, which is the header `webhook-id` too. Raises WebhookRefused, and
    BadSecret (a ValueError) for secrets that are none.
    """
    known = read_secrets(secrets)
    given = {name.lower(): value for name, value in headers.items()}
    if not _SECONDS.fullmatch(given.get("webhook-timestamp", "1")):
        raise WebhookRefused("webhook-timestamp is not a time in whole seconds")
    problems = set()
    for secret in known:
        try:
            secret.verify(body, given, json_parse=False)
            break
        except WebhookVerificationError as error:
            problems.add(str(error))
        except ValueError:  # the library's, where a header or the body is not even text of the right shape
            problems.add("Malformed signature headers or body")
    else:
        raise WebhookRefused("; ".join(sorted(problems)))
    return _decode(body, given["webhook-id"])


def _decode(body: bytes, webhook_id: str) -> Event:
    try:
        event = decode_event(body)
    except EventError as error:
        raise WebhookRefused(str(error)) from None
    if event.id != webhook_id:
        raise WebhookRefused("webhook-id is not the event's id")
    return event
