"""LoRA URLs that look well and lead astray: names whose addresses change, redirects, signatures that do not fit."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohappyeyeballs
import aiohttp
import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from schemas.net.http import open_session
from schemas.net.urls import HostRules
from tests.s3_stub import S3Stub, content, status
from tests.unit.bad_inputs.kit import CANARY, FINE, FORBIDDEN, OUT_OF_REACH, SIGN_AGAIN, Outcome, fetched

PUBLIC, LOOPBACK, METADATA = "8.8.8.8", "127.0.0.1", "169.254.169.254"
NAME = "account.r2.example"
PATH = "/loras/style.safetensors"


class Answers(AbstractResolver):
    """A name server whose answers change from one question to the next; the last one stays."""

    def __init__(self, *answers: list[str]) -> None:
        self._answers = list(answers)
        self.asked = 0

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        addresses = self._answers[min(self.asked, len(self._answers) - 1)]
        self.asked += 1
        return [
            ResolveResult(hostname=host, host=address, port=port, family=socket.AF_INET, proto=0, flags=0)
            for address in addresses
        ]

    async def close(self) -> None:
        return


@dataclass
class Network:
    """What is dialled. Public addresses do not answer; on loopback there is a server that counts its visitors."""

    port: int = 0
    dialled: list[str] = field(default_factory=list)
    visitors: int = 0

    @property
    def url(self) -> str:
        return f"https://{NAME}:{self.port}/x?X-Amz-Signature={CANARY}"

    @property
    def rules(self) -> HostRules:
        return HostRules.parse(f"{NAME}:{self.port}", default=HostRules())

    def visited(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.visitors += 1
        writer.close()

    def dialling(self, dial: Callable[..., Any]) -> Callable[..., Any]:
        async def start_connection(addr_infos: list[Any], **options: Any) -> socket.socket:
            addresses = [info[4][0] for info in addr_infos]
            self.dialled += addresses
            if PUBLIC in addresses:
                raise ConnectionRefusedError
            connected: socket.socket = await dial(addr_infos=addr_infos, **options)
            return connected

        return start_connection


@pytest.fixture
async def network(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Network]:
    network = Network()
    dialling = network.dialling(aiohappyeyeballs.start_connection)
    monkeypatch.setattr(aiohappyeyeballs, "start_connection", dialling)
    async with await asyncio.start_server(network.visited, LOOPBACK, 0) as server:
        network.port = server.sockets[0].getsockname()[1]
        yield network


async def test_the_server_of_these_tests_counts_whoever_reaches_it(network: Network, tmp_path: Path) -> None:
    rules = HostRules.parse("localhost", default=HostRules(allow_loopback=True))
    async with open_session(allow_loopback=True, resolver=Answers([LOOPBACK])) as session:
        url = network.url.replace(NAME, "localhost")
        assert await fetched(session, tmp_path, url, rules) == OUT_OF_REACH
    assert network.dialled[0] == LOOPBACK
    assert network.visitors > 0


async def test_a_name_that_is_rebound_is_connected_where_it_was_checked(network: Network, tmp_path: Path) -> None:
    """Guards `CheckedResolver.resolve`, whose own answer is the one that is dialled: nobody asks a second time."""
    answers = Answers([PUBLIC], [LOOPBACK])
    async with open_session(allow_loopback=True, resolver=answers) as session:
        assert await fetched(session, tmp_path, network.url, network.rules) == OUT_OF_REACH
    assert answers.asked == 1
    assert set(network.dialled) == {PUBLIC}
    assert network.visitors == 0


async def test_a_name_that_is_rebound_before_the_next_connection_is_refused(network: Network, tmp_path: Path) -> None:
    """Guards `check_addresses` in `CheckedResolver.resolve`: every answer is checked, not a name once and for all."""
    answers = Answers([PUBLIC], [LOOPBACK])
    async with open_session(allow_loopback=True, resolver=answers) as session:
        assert await fetched(session, tmp_path, network.url, network.rules) == OUT_OF_REACH
        assert isinstance(session.connector, aiohttp.TCPConnector)
        session.connector.clear_dns_cache()
        assert await fetched(session, tmp_path, network.url, network.rules) == FORBIDDEN
    assert answers.asked == 2
    assert LOOPBACK not in network.dialled
    assert network.visitors == 0


@pytest.mark.parametrize("addresses", [[PUBLIC, LOOPBACK], [LOOPBACK, PUBLIC], [PUBLIC, METADATA]], ids="-".join)
async def test_a_name_with_a_public_and_another_address_is_refused_as_a_whole(
    addresses: list[str], network: Network, tmp_path: Path
) -> None:
    """Guards `check_addresses`, which looks at each of them."""
    async with open_session(allow_loopback=True, resolver=Answers(addresses)) as session:
        assert await fetched(session, tmp_path, network.url, network.rules) == FORBIDDEN
    assert network.dialled == []
    assert network.visitors == 0


@pytest.fixture
async def fetch(stub: S3Stub, tmp_path: Path) -> AsyncIterator[Callable[[str], Any]]:
    """Fetches from the stub, with a clock that is right."""
    stub.put(PATH, b"weights")
    rules = HostRules.own(stub.url, "loras", allow_loopback=True)
    async with open_session(allow_loopback=True) as session:
        yield lambda url: fetched(session, tmp_path, url, rules, now=datetime.now(UTC))


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "location",
    [f"http://{METADATA}/latest/meta-data", f"http://{NAME}/loras/a", "", "/loras/other", f"//{METADATA}/"],
    ids=["metadata", "http", "a loop", "the same host", "no scheme"],
)
async def test_no_redirect_is_followed(code: int, location: str, stub: S3Stub, fetch: Callable[[str], Any]) -> None:
    """Guards `allow_redirects=False` in `schemas.net.http.exchange`."""
    stub.answer(PATH, status(code, Location=location or stub.url + PATH))
    stub.answer("/loras/other", content(b"weights"))
    assert await fetch(stub.presign("GET", PATH)) == FORBIDDEN
    assert len(stub.seen) == 1


def presigned(stub: S3Stub, name: str) -> str:
    now = datetime.now(UTC)
    match name:
        case "fresh":
            return stub.presign("GET", PATH)
        case "signed for PUT":
            return stub.presign("PUT", PATH)
        case "unsigned":
            return stub.url + PATH
        case "tampered":
            return stub.presign("GET", PATH)[:-4] + "0000"
        case "signed for another object":
            return stub.presign("GET", "/loras/other").replace("/loras/other", PATH)
        case "expiry over 604800":
            return stub.presign("GET", PATH, expires_s=604_801)
        case "expired a minute ago":
            return stub.presign("GET", PATH, expires_s=60, at=now - timedelta(minutes=2))
        case "expired":
            return stub.presign("GET", PATH, at=now - timedelta(days=1))
        case _:
            return stub.presign("GET", PATH, at=now + timedelta(days=1))


@pytest.mark.parametrize(
    ("name", "outcome", "requests"),
    [
        ("fresh", FINE, 1),
        ("signed for PUT", SIGN_AGAIN, 1),
        ("unsigned", SIGN_AGAIN, 1),
        ("tampered", SIGN_AGAIN, 1),
        ("signed for another object", SIGN_AGAIN, 1),
        ("expiry over 604800", FORBIDDEN, 0),
        ("expired a minute ago", SIGN_AGAIN, 1),
        ("expired", SIGN_AGAIN, 0),
        ("dated in the future", SIGN_AGAIN, 0),
    ],
)
async def test_a_signature_that_does_not_fit_is_refused(
    name: str, outcome: Outcome | None, requests: int, stub: S3Stub, fetch: Callable[[str], Any]
) -> None:
    """Guards `_failure`, which tells 401 and 403 from the rest, and `_check_lifetime`, where no request is made."""
    assert await fetch(presigned(stub, name)) == outcome
    assert len(stub.seen) == requests
