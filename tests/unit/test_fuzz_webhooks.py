"""Whatever a receiver is sent, `verify` refuses it or gives the one event that was signed."""

import base64
import hmac
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from producer.webhooks.receiver import WebhookRefused, verify
from producer.webhooks.signing import read_secrets, signed_headers
from schemas.events import Event
from tests import event_kit

KEY = b"a webhook secret of 32 bytes...."
SECRET = "whsec_" + base64.b64encode(KEY).decode()
EVENT = event_kit.succeeded()
BODY = EVENT.encode()
NAMES = ("webhook-id", "webhook-timestamp", "webhook-signature")

fuzz = settings(derandomize=True, database=None, deadline=None, max_examples=200)
texts = (
    st.text(max_size=40) | st.text(alphabet="v1a,= .:", max_size=20) | st.integers().map(str) | st.floats().map(repr)
)


def good() -> dict[str, str]:
    return signed_headers(read_secrets(SECRET), EVENT.id, BODY, datetime.now(UTC))


def verified(body: bytes, headers: dict[str, str]) -> Event | None:
    """The event, None where it is refused. Guards the `except`s of `verify`: any other exception fails."""
    try:
        event = verify(body, headers, SECRET)
    except WebhookRefused:
        return None
    assert is_signed(body, headers)
    return event


def is_signed(body: bytes, headers: dict[str, str]) -> bool:
    """Whether one of the signatures is the right one, told without the library."""
    given_ones = {name.lower(): value for name, value in headers.items()}
    to_sign = f"{given_ones[NAMES[0]]}.{given_ones[NAMES[1]]}.".encode() + body
    right = hmac.digest(KEY, to_sign, "sha256")
    tokens = (token.partition(",") for token in given_ones[NAMES[2]].split(" "))
    return any(version == "v1" and base64.b64decode(text) == right for version, _, text in tokens)


@fuzz
@given(body=st.binary(max_size=60) | st.just(BODY), headers=st.dictionaries(st.sampled_from(NAMES) | texts, texts))
def test_any_headers_with_any_body_are_refused(body: bytes, headers: dict[str, str]) -> None:
    assert verified(body, headers) is None


@fuzz
@given(name=st.sampled_from(NAMES), text=texts)
def test_any_other_text_in_one_header_is_refused(name: str, text: str) -> None:
    headers = good()
    event = verified(BODY, {**headers, name: text})
    assert event is None or headers[name] == text


@fuzz
@given(
    name=st.sampled_from(NAMES),
    place=st.integers(0, 80),
    letter=st.characters(codec="ascii"),
    cut=st.integers(0, 1),
)
def test_a_header_with_a_letter_changed_or_added_says_the_same_or_is_refused(
    name: str, place: int, letter: str, cut: int
) -> None:
    headers = good()
    text = headers[name]
    changed = text[:place] + letter + text[place + cut :]
    event = verified(BODY, {**headers, name: changed})
    assert event in (None, EVENT)
    assert event is None or name == NAMES[2] or changed == text


@fuzz
@given(
    place=st.integers(0, len(BODY) - 1), byte=st.integers(0, 255), end=st.integers(1, len(BODY)) | st.just(len(BODY))
)
def test_a_body_of_which_a_byte_is_other_is_refused(place: int, byte: int, end: int) -> None:
    body = bytearray(BODY)
    body[place] = byte
    event = verified(bytes(body[:end]), good())
    assert (event is not None) == (body[:end] == BODY)


@fuzz
@given(body=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_whatever_is_signed_and_is_no_event_is_refused(body: bytes) -> None:
    """Guards `_decode`, which turns an EventError into a refusal."""
    try:
        headers = signed_headers(read_secrets(SECRET), EVENT.id, body, datetime.now(UTC))
    except UnicodeDecodeError:
        return
    with pytest.raises(WebhookRefused):
        verify(body, headers, SECRET)
