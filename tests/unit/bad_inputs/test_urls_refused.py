"""LoRA and upload URLs that lead where they must not: refused before a name is looked up, let alone a connection made.

What takes an answer to be refused (redirects, changing addresses, signatures) is in the integration tests.
"""

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from aiohttp import ClientSession

from consumer.errors import UploadRefused
from consumer.presigned import MAX_LIFETIME_S
from consumer.storage import UploadUrls
from producer.errors import RequestRefused
from producer.requests import make_request
from schemas.entries import decode_entry
from schemas.errors import ErrorCode
from schemas.net.http import open_session
from schemas.net.urls import HostRule, HostRules
from tests.unit.bad_inputs.kit import (
    CANARY,
    FORBIDDEN,
    JOB_ID,
    NOW,
    OUT_OF_REACH,
    REFUSED,
    SIGN_AGAIN,
    Outcome,
    failed,
    fetched,
    payload,
)
from tests.unit.bad_inputs.urls import (
    ADDRESSES,
    CATALOGUE,
    HOST,
    MORE_ADDRESSES,
    NUMBERS_THAT_NO_LIST_CAN_NAME,
    OWN,
    SIGNATURE,
    URLS,
    NoNames,
)


@pytest.fixture
def names() -> NoNames:
    return NoNames()


@pytest.fixture
async def session(names: NoNames) -> AsyncIterator[ClientSession]:
    async with open_session(allow_loopback=True, resolver=names) as session:
        yield session


async def uploaded(session: ClientSession, url: str, rules: HostRules = OWN) -> Outcome:
    """How a job ends whose picture is to go to `url`."""
    entry = decode_entry({b"payload": payload(upload_url=url)})
    if entry.request is None:
        return await failed(entry)
    with pytest.raises(UploadRefused) as caught:
        UploadUrls(session, rules).check(url, NOW)
    return await failed(entry, caught.value)


def test_the_catalogue_counts_35_urls_that_are_refused_unseen() -> None:
    """The other ten are refused for what the other side answers."""
    assert len(CATALOGUE) == 35


@pytest.mark.parametrize("name", URLS)
async def test_a_lora_is_not_fetched_from(name: str, session: ClientSession, names: NoNames, tmp_path: Path) -> None:
    """Guards `schemas.fields._check_url` and `HostRules.check`, which `exchange` asks before it connects."""
    url, outcome = URLS[name]
    assert await fetched(session, tmp_path, url, OWN) == outcome
    assert names.asked == []


@pytest.mark.parametrize("name", URLS)
async def test_a_picture_is_not_stored_at(name: str, session: ClientSession) -> None:
    """Guards `HostRules.check` in `UploadUrls.check`."""
    url, outcome = URLS[name]
    expected = outcome if outcome == REFUSED else replace(outcome, code=ErrorCode.UPLOAD_FAILED)
    assert await uploaded(session, url) == expected


@pytest.mark.parametrize("name", [name for name, (_, outcome) in URLS.items() if outcome == REFUSED])
def test_the_client_refuses_a_url_that_is_none(name: str) -> None:
    """Guards `producer.requests.make_request`."""
    with pytest.raises(RequestRefused) as caught:
        make_request({"job_id": JOB_ID, "prompt": "a lighthouse", "lora_url": URLS[name][0]})
    assert caught.value.error_code == ErrorCode.INVALID_REQUEST
    assert CANARY not in f"{caught.value} {caught.value.details}"


@pytest.mark.parametrize("host", ADDRESSES + MORE_ADDRESSES)
async def test_an_address_that_is_not_public_is_refused_though_a_list_names_it(
    host: str, session: ClientSession, names: NoNames, tmp_path: Path
) -> None:
    """Guards `_check_literal_address`."""
    if host in NUMBERS_THAT_NO_LIST_CAN_NAME:
        with pytest.raises(ValueError, match="not an address as usually written"):
            HostRule.parse(host)
        return
    rules = HostRules((HostRule.parse(host),))
    assert await fetched(session, tmp_path, f"https://{host}/loras/a{SIGNATURE}", rules) == FORBIDDEN
    assert names.asked == []


async def test_an_allowed_host_in_upper_case_is_the_same_host(
    session: ClientSession, names: NoNames, tmp_path: Path
) -> None:
    url = f"HTTPS://{HOST.upper()}/loras/a{SIGNATURE}"
    assert await fetched(session, tmp_path, url, OWN) == OUT_OF_REACH
    assert [name.lower() for name in names.asked] == [HOST]


def signed(*, at: str = f"{NOW:%Y%m%dT%H%M%SZ}", expires_s: str = "300") -> str:
    return f"https://{HOST}/loras/a?X-Amz-Date={at}&X-Amz-Expires={expires_s}&X-Amz-Signature={CANARY}"


LIFETIMES = {
    "an expiry over 604800": (signed(expires_s=str(MAX_LIFETIME_S + 1)), FORBIDDEN),
    "an expiry of 0": (signed(expires_s="0"), FORBIDDEN),
    "expired": (signed(at=f"{NOW - timedelta(hours=1):%Y%m%dT%H%M%SZ}"), SIGN_AGAIN),
    "expired long ago": (signed(at="00010101T000000Z"), SIGN_AGAIN),
    "dated in the future": (signed(at=f"{NOW + timedelta(hours=1):%Y%m%dT%H%M%SZ}"), SIGN_AGAIN),
    "dated in the last minute of all times": (signed(at="99991231T235900Z", expires_s="1"), SIGN_AGAIN),
    "expired in the old way": (f"https://{HOST}/loras/a?AWSAccessKeyId=k&Expires=1&Signature={CANARY}", SIGN_AGAIN),
}


@pytest.mark.parametrize("name", LIFETIMES)
async def test_no_store_is_asked_for_what_none_may_serve(
    name: str, session: ClientSession, names: NoNames, tmp_path: Path
) -> None:
    """Guards `consumer.lora.fetch._check_lifetime`."""
    url, outcome = LIFETIMES[name]
    assert await fetched(session, tmp_path, url, OWN) == outcome
    assert names.asked == []


@pytest.mark.parametrize(
    "url",
    [
        f"https://{HOST}/loras/a",
        f"https://{HOST}/loras/a?X-Amz-Signature={CANARY}",
        signed(expires_s="soon"),
        signed(at="99991231T235959Z"),
        signed(at=f"{NOW - timedelta(minutes=10):%Y%m%dT%H%M%SZ}"),
        signed(at=f"{NOW + timedelta(minutes=10):%Y%m%dT%H%M%SZ}"),
        f"https://{HOST}/loras/a?sv=2026-01-01&se=2020-01-01&sig={CANARY}",
    ],
    ids=["unsigned", "undated", "illegible", "beyond all times", "just expired", "a fast clock", "another kind"],
)
async def test_what_a_store_may_think_otherwise_of_is_for_the_store_to_judge(
    url: str, session: ClientSession, names: NoNames, tmp_path: Path
) -> None:
    """Clocks differ, and an allowed host may sign in its own way."""
    assert await fetched(session, tmp_path, url, OWN) == OUT_OF_REACH
    assert names.asked == [HOST]
