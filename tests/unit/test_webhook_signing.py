"""Signatures of webhooks: as Standard Webhooks publishes them, and as its own library and receivers check them."""

import base64
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from standardwebhooks import Webhook, WebhookVerificationError, webhooks

from producer.webhooks.receiver import WebhookRefused, verify
from producer.webhooks.signing import BadSecret, read_secrets, signed_headers
from tests import event_kit

# https://github.com/standard-webhooks/standard-webhooks, libraries/go/webhook_test.go and its siblings
PUBLISHED_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
PUBLISHED_ID = "msg_p5jXN8AQM9LWM0D4loKWxJek"
PUBLISHED_AT = datetime.fromtimestamp(1614265330, UTC)
PUBLISHED_BODY = b'{"test": 2432232314}'
PUBLISHED_SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
WRONG_SIGNATURE = "v1,Ceo5qEr07ixe2NLpvHk3FH9bwy/WavXrAFQ/9tdO6mc="

EVENT = event_kit.succeeded()
BODY = EVENT.encode()
OTHER_SECRET = "whsec_" + base64.b64encode(b"another secret of 32 bytes, new.").decode()


def headers(at: datetime | None = None, secrets: str = PUBLISHED_SECRET, body: bytes = BODY) -> dict[str, str]:
    return signed_headers(read_secrets(secrets), EVENT.id, body, at or datetime.now(UTC))


def at_the_time_of_the_example(patch: pytest.MonkeyPatch) -> None:
    class Then(datetime):
        @classmethod
        def now(cls, tz: object = None) -> "Then":
            return cls.fromtimestamp(PUBLISHED_AT.timestamp(), UTC)

    patch.setattr(webhooks, "datetime", Then)


@pytest.mark.parametrize("secret", [PUBLISHED_SECRET, PUBLISHED_SECRET.removeprefix("whsec_")])
def test_the_published_example_is_signed_as_published(secret: str) -> None:
    assert signed_headers(read_secrets(secret), PUBLISHED_ID, PUBLISHED_BODY, PUBLISHED_AT) == {
        "webhook-id": PUBLISHED_ID,
        "webhook-timestamp": "1614265330",
        "webhook-signature": PUBLISHED_SIGNATURE,
    }


def test_the_published_example_passes_as_signed_and_is_no_event_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "webhook-id": PUBLISHED_ID,
        "webhook-timestamp": "1614265330",
        "webhook-signature": PUBLISHED_SIGNATURE,
    }
    with pytest.raises(WebhookRefused, match="too old"):
        verify(PUBLISHED_BODY, given, PUBLISHED_SECRET)
    at_the_time_of_the_example(monkeypatch)
    with pytest.raises(WebhookRefused, match="not an event"):
        verify(PUBLISHED_BODY, given, PUBLISHED_SECRET)
    with pytest.raises(WebhookRefused, match="No matching signature"):
        verify(PUBLISHED_BODY + b" ", given, PUBLISHED_SECRET)


@pytest.mark.parametrize("secret", [PUBLISHED_SECRET, OTHER_SECRET])
def test_the_official_library_takes_our_signatures_under_each_secret_while_they_rotate(secret: str) -> None:
    given = headers(secrets=f"{OTHER_SECRET}, {PUBLISHED_SECRET}")
    assert len(given["webhook-signature"].split(" ")) == 2
    assert Webhook(secret).verify(BODY, given)["id"] == EVENT.id
    with pytest.raises(WebhookVerificationError):
        Webhook(secret).verify(BODY.replace(b"job-1", b"job-2"), given)


def test_the_official_library_takes_a_body_in_every_script() -> None:
    body = event_kit.failed(error="ü, 図, \U0001f58c, a \\ and a newline\n").encode()
    Webhook(PUBLISHED_SECRET).verify(body, headers(body=body))


def test_a_time_in_another_zone_is_the_same_time() -> None:
    there = PUBLISHED_AT.astimezone(datetime.strptime("+0530", "%z").tzinfo)
    assert headers(there) == headers(PUBLISHED_AT)
    Webhook(PUBLISHED_SECRET).verify(BODY, headers(datetime.now(there.tzinfo)))


def test_a_good_webhook_is_its_event() -> None:
    assert verify(BODY, headers(), PUBLISHED_SECRET) == EVENT


def test_the_names_of_headers_may_be_in_any_case() -> None:
    assert verify(BODY, {name.title(): value for name, value in headers().items()}, PUBLISHED_SECRET) == EVENT


@pytest.mark.parametrize(
    "known", [f"{OTHER_SECRET},{PUBLISHED_SECRET}", [OTHER_SECRET, PUBLISHED_SECRET], [PUBLISHED_SECRET]]
)
def test_a_receiver_that_knows_several_secrets_takes_each(known: str | list[str]) -> None:
    assert verify(BODY, headers(), known) == EVENT


@pytest.mark.parametrize("signatures", [f"v2,abc {{}} {WRONG_SIGNATURE}", f"{WRONG_SIGNATURE} {{}}"])
def test_one_good_signature_among_others_is_enough(signatures: str) -> None:
    given = headers()
    given["webhook-signature"] = signatures.format(given["webhook-signature"])
    assert verify(BODY, given, PUBLISHED_SECRET) == EVENT


Spoil = Callable[[dict[str, str]], object]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda given: given.pop("webhook-id"),
        lambda given: given.pop("webhook-timestamp"),
        lambda given: given.pop("webhook-signature"),
        lambda given: given.update({"webhook-id": "job-2:1:succeeded"}),
        lambda given: given.update({"webhook-signature": WRONG_SIGNATURE}),
        lambda given: given.update({"webhook-signature": "v1"}),
        lambda given: given.update({"webhook-signature": "v1,ä"}),
        lambda given: given.update({"webhook-signature": "v1,a"}),
        lambda given: given.update({"webhook-signature": given["webhook-signature"].replace("v1,", "v2,")}),
        lambda given: given.update({"webhook-timestamp": "soon"}),
        lambda given: given.update({"webhook-timestamp": "nan"}),
        lambda given: given.update({"webhook-timestamp": "9" * 400}),
        lambda given: given.update({"webhook-timestamp": str(int(given["webhook-timestamp"]) + 1)}),
    ],
)
def test_spoiled_headers_are_refused_with_one_kind_of_error(spoil: Spoil) -> None:
    given = headers()
    spoil(given)
    with pytest.raises(WebhookRefused):
        verify(BODY, given, PUBLISHED_SECRET)


@pytest.mark.parametrize("minutes", [-6, 6])
def test_a_signature_is_good_for_five_minutes_before_and_after_its_time(minutes: int) -> None:
    now = datetime.now(UTC)
    assert verify(BODY, headers(now + timedelta(minutes=minutes) * 0.75), PUBLISHED_SECRET) == EVENT
    with pytest.raises(WebhookRefused, match=r"too (old|new)"):
        verify(BODY, headers(now + timedelta(minutes=minutes)), PUBLISHED_SECRET)


def test_a_body_that_is_not_text_is_refused() -> None:
    with pytest.raises(WebhookRefused):
        verify(b"\xff\xfe", headers(), PUBLISHED_SECRET)


def test_an_event_under_another_id_than_its_own_is_refused() -> None:
    given = signed_headers(read_secrets(PUBLISHED_SECRET), "job-9:1:succeeded", BODY, datetime.now(UTC))
    with pytest.raises(WebhookRefused, match="not the event's id"):
        verify(BODY, given, PUBLISHED_SECRET)


def secret_of(length: int) -> str:
    return "whsec_" + base64.b64encode(bytes(range(length))).decode()


@pytest.mark.parametrize("length", [24, 32, 64])
def test_a_secret_has_24_to_64_bytes(length: int) -> None:
    assert len(read_secrets(secret_of(length))) == len(read_secrets(secret_of(length).rstrip("="))) == 1


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        ("", "there is no secret"),
        (" , ", "there is no secret"),
        ([], "there is no secret"),
        (secret_of(23), "secret 1 of 1 has 23 bytes"),
        (secret_of(65), "secret 1 of 1 has 65 bytes"),
        (f"{PUBLISHED_SECRET},whsec_not/base64!at-all", "secret 2 of 2 is not base64"),
        (f"{PUBLISHED_SECRET},whsec_café", "secret 2 of 2 is not base64"),
        ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwA", "secret 1 of 1 is not base64"),
        ("whsec_", "secret 1 of 1 has 0 bytes"),
        (["whpk_" + "A" * 32], "secret 1 of 1 is not base64"),
    ],
)
def test_a_text_that_is_no_secret_is_refused_without_repeating_it(texts: str | list[str], problem: str) -> None:
    with pytest.raises(BadSecret) as caught:
        read_secrets(texts)
    assert problem in str(caught.value)
    assert "whsec_" not in str(caught.value)
    assert caught.value.__cause__ is None
    with pytest.raises(BadSecret):
        verify(BODY, headers(), texts)


def test_a_receiver_needs_neither_redis_nor_a_database() -> None:
    code = (
        "import sys; from producer.webhooks.receiver import verify;"
        "print([name for name in ('redis', 'rq', 'sqlalchemy', 'aiohttp', 'boto3') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
