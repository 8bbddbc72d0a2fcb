"""Webhooks that are not ours, or not as we sent them: one kind of error, which a receiver answers 401."""

import base64
import hmac
import json
import re
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from standardwebhooks import webhooks

from producer.webhooks.receiver import WebhookRefused, verify
from producer.webhooks.signing import BadSecret, read_secrets, signed_headers
from tests import event_kit

SECRET = "whsec_" + base64.b64encode(b"a webhook secret of 32 bytes....").decode()
NEW_SECRET = "whsec_" + base64.b64encode(b"the next secret, and 32 bytes...").decode()
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
EVENT = event_kit.succeeded()
BODY = EVENT.encode()
ID, TIME, SIGNATURE = "webhook-id", "webhook-timestamp", "webhook-signature"

Headers = dict[str, str]
PAGE = (Path(__file__).parents[3] / "docs/webhooks.md").read_text()


class Frozen(datetime):
    @classmethod
    def now(cls, tz: object = None) -> "Frozen":
        return cls.fromtimestamp(NOW.timestamp(), UTC)


@pytest.fixture(autouse=True)
def _frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "datetime", Frozen)


def signed(body: bytes = BODY, *, secret: str = SECRET, event_id: str = EVENT.id, late_s: int = 0) -> Headers:
    return signed_headers(read_secrets(secret), event_id, body, NOW + timedelta(seconds=late_s))


def with_time(text: str) -> Headers:
    """Signed by somebody who has the secret, under a time that is written as `text`."""
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    to_sign = f"{EVENT.id}.{int(NOW.timestamp())}.".encode() + BODY
    signature = base64.b64encode(hmac.digest(key, to_sign, "sha256")).decode()
    return {ID: EVENT.id, TIME: text, SIGNATURE: f"v1,{signature}"}


def changed(name: str, change: Callable[[str], str]) -> Headers:
    headers = signed()
    return {**headers, name: change(headers[name])}


def without(name: str) -> Headers:
    headers = signed()
    del headers[name]
    return headers


@dataclass(frozen=True, slots=True)
class Hook:
    """`said`: part of the refusal; None: it passes."""

    name: str
    headers: Headers
    said: str | None
    body: bytes = BODY
    secrets: str = SECRET


def hook_name(hook: Hook) -> str:
    return hook.name


SECONDS = str(int(NOW.timestamp()))
MISSING, MALFORMED, NO_MATCH = "Missing required", "Malformed signature headers or body", "No matching signature"
NO_TIME, NO_EVENT = "not a time in whole seconds", "not an event"
NOT_JSON = b'{"type": "generation.succeeded", '
REWRITTEN = json.dumps(json.loads(BODY), indent=1).encode()
TWICE = BODY[:-1] + b',"type":"generation.failed"}'
BYTES = b"\xff\xfe{}"
HOOKS = [
    Hook("no id", without(ID), MISSING),
    Hook("no timestamp", without(TIME), MISSING),
    Hook("no signature", without(SIGNATURE), MISSING),
    Hook("no headers at all", {}, MISSING),
    Hook("an empty id", changed(ID, lambda _: ""), MISSING),
    Hook("an empty signature", changed(SIGNATURE, lambda _: ""), MISSING),
    Hook("a signature without a comma", changed(SIGNATURE, lambda text: text.replace(",", "")), MALFORMED),
    Hook("a signature with two commas", changed(SIGNATURE, lambda text: text.replace(",", ",,")), MALFORMED),
    Hook("a signature with a leading space", changed(SIGNATURE, lambda text: f" {text}"), MALFORMED),
    Hook("a signature in bad base64", changed(SIGNATURE, lambda _: "v1,abcde"), MALFORMED),
    Hook("a signature that is not ASCII", changed(SIGNATURE, lambda _: "v1,ä"), MALFORMED),
    Hook("a signature cut short", changed(SIGNATURE, lambda text: text[:-4]), NO_MATCH),
    Hook("v1a only", changed(SIGNATURE, lambda text: text.replace("v1,", "v1a,")), NO_MATCH),
    Hook("V1 in capitals", changed(SIGNATURE, lambda text: text.replace("v1,", "V1,")), NO_MATCH),
    Hook("a wrong secret", signed(secret=NEW_SECRET), NO_MATCH),
    Hook("an old secret, by a receiver that has rotated", signed(), NO_MATCH, secrets=NEW_SECRET),
    Hook("an old secret, by a receiver that rotates", signed(), None, secrets=f"{NEW_SECRET},{SECRET}"),
    Hook("both secrets, by a receiver that knows the old", signed(secret=f"{NEW_SECRET},{SECRET}"), None),
    Hook("301 seconds ago", signed(late_s=-301), "too old"),
    Hook("300 seconds ago", signed(late_s=-300), None),
    Hook("in 301 seconds", signed(late_s=301), "too new"),
    Hook("in 300 seconds", signed(late_s=300), None),
    Hook("a timestamp of nan", with_time("nan"), NO_TIME),
    Hook("a timestamp of inf", with_time("inf"), NO_TIME),
    Hook("a timestamp of 1e400", with_time("1e400"), NO_TIME),
    Hook("a timestamp with a fraction", with_time(f"{SECONDS}.5"), NO_TIME),
    Hook("a timestamp as a power of ten", with_time(f"{SECONDS}e0"), NO_TIME),
    Hook("a timestamp with a blank", with_time(f" {SECONDS}"), NO_TIME),
    Hook("a timestamp with a newline", with_time(f"{SECONDS}\n"), NO_TIME),
    Hook("a timestamp with an underscore", with_time(f"{SECONDS[:1]}_{SECONDS[1:]}"), NO_TIME),
    Hook("a timestamp with a leading zero", with_time(f"0{SECONDS}"), NO_TIME),
    Hook("a timestamp in other digits", with_time(SECONDS.translate({48 + i: 0x660 + i for i in range(10)})), NO_TIME),
    Hook("a timestamp of 5000 digits", with_time("9" * 5000), NO_TIME),
    Hook("a negative timestamp", with_time(f"-{SECONDS}"), NO_TIME),
    Hook("the same timestamp, as it should be", with_time(SECONDS), None),
    Hook("another timestamp than the signed one", changed(TIME, lambda text: str(int(text) - 1)), NO_MATCH),
    Hook("a body that is not UTF-8", signed(), MALFORMED, BYTES),
    Hook("a body that was parsed and written anew", signed(), NO_MATCH, REWRITTEN),
    Hook("a body with a newline more", signed(), NO_MATCH, BODY + b"\n"),
    Hook("no body", signed(), NO_MATCH, b""),
    Hook("bad JSON, signed", signed(NOT_JSON), NO_EVENT, NOT_JSON),
    Hook("JSON that is no event, signed", signed(b"[]"), NO_EVENT, b"[]"),
    Hook("a key twice, signed", signed(TWICE), NO_EVENT, TWICE),
    Hook("an id with a dot", signed(event_id=f"{EVENT.id}.1"), "not the event's id"),
    Hook("an id that takes the timestamp's place", changed(ID, lambda text: f"{text}.{SECONDS}"), NO_MATCH),
    Hook("another event's id, signed", signed(event_id="job-9:1:succeeded"), "not the event's id"),
]


def test_the_catalogue_counts_24_webhooks() -> None:
    """Besides these: an id that is replayed, and secrets that are none."""
    assert len({hook.name for hook in HOOKS}) == len(HOOKS) >= 24


@pytest.mark.parametrize("hook", HOOKS, ids=hook_name)
def test_a_webhook_is_its_event_or_refused_with_the_reason(hook: Hook) -> None:
    """Guards `verify`: `_SECONDS`, both `except`s around the library, and the comparison of the ids in `_decode`."""
    if hook.said is None:
        assert verify(hook.body, hook.headers, hook.secrets) == EVENT
        return
    with pytest.raises(WebhookRefused, match=re.escape(hook.said)) as refusal:
        verify(hook.body, hook.headers, hook.secrets)
    assert type(refusal.value) is WebhookRefused
    assert "whsec_" not in str(refusal.value)
    assert refusal.value.__cause__ is None


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if "\n" not in hook.headers.get(TIME, "")], ids=hook_name)
async def test_the_receiver_of_the_documents_answers_401_or_takes_it(hook: Hook, tmp_path: Path) -> None:
    """Guards the `except WebhookRefused` of the example in docs/webhooks.md: nothing of a stranger's is a 500."""
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    code, found = re.subn(r'^SECRET = ".*?".*$', f"SECRET = {hook.secrets!r}", code, flags=re.MULTILINE)
    assert found == 1
    (tmp_path / "receiver.py").write_text(code)
    app = runpy.run_path(str(tmp_path / "receiver.py"))["app"]
    headers = {name.encode(): value.encode() for name, value in hook.headers.items()}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://receiver") as client:
        answer = await client.post("/hooks/sdxl", content=hook.body, headers=headers)
    assert answer.status_code == (204 if hook.said is None else 401)


def test_a_webhook_that_is_replayed_is_the_same_event_with_the_same_id() -> None:
    """`verify` keeps nothing: the id is what a receiver remembers, and no signature passes under another one."""
    assert verify(BODY, signed(), SECRET).id == verify(BODY, signed(late_s=60), SECRET).id == EVENT.id


@pytest.mark.parametrize(
    ("secrets", "said"),
    [
        pytest.param("", "there is no secret", id="an empty secret"),
        pytest.param(" , ", "there is no secret", id="blanks and commas"),
        pytest.param("whsec_", "has 0 bytes", id="a prefix alone"),
        pytest.param("whsec_" + base64.b64encode(b"abc").decode(), "has 3 bytes", id="3 bytes"),
        pytest.param(SECRET + ",whsec_YWJj", "secret 2 of 2 has 3 bytes", id="3 bytes beside a good one"),
        pytest.param("whsec_not base64!", "is not base64", id="no base64"),
    ],
)
def test_a_receivers_own_bad_secret_is_an_error_of_its_own(secrets: str, said: str) -> None:
    """Guards `read_secrets`: with an empty key anybody can sign. No 401: it is not the sender's fault."""
    with pytest.raises(BadSecret, match=said) as caught:
        verify(BODY, signed(), secrets)
    assert not isinstance(caught.value, WebhookRefused)
    assert SECRET not in str(caught.value)
