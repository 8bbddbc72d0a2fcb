"""The guarded way out: HTTP exchanges with storage and webhooks that connect only to what was checked.

The session's resolver hands on checked addresses only, so what is connected to is what was checked. Nothing is
redirected, decompressed, or read from the environment, and no error repeats a URL's query.
"""

import io
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from schemas.net.urls import HostRules, check_addresses
from schemas.redact import without_query

READ_BUFFER_BYTES = 1 << 20
MAX_RETRY_AFTER_S = 86_400.0


class ExchangeBroken(Exception):
    """The exchange came to no proper end: DNS, TLS, connect, reset, a deadline, a truncated body.

    The text says which, and no URL.
    """


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long one exchange may take: to be connected, between two reads, as a whole."""

    connect_s: float = 5.0
    read_s: float = 10.0
    whole_s: float = 30.0


DEFAULT_DEADLINES = Deadlines()
Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """The clock of this machine."""
    return datetime.now(UTC)


class _ConnectionLost(aiohttp.ClientError):
    """The connection broke after the request may have been taken."""


async def _send_once(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    # aiohttp by itself repeats a PUT whose reply is lost, and what the second one is answered misleads
    try:
        return await send(request)
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        if request.method == "GET":
            raise
        raise _ConnectionLost(type(error).__name__) from None


class CheckedResolver(AbstractResolver):
    """Resolves through `inner`, and refuses a name as soon as one of its addresses is not allowed."""

    def __init__(self, inner: AbstractResolver, *, allow_loopback: bool) -> None:
        self._inner = inner
        self._allow_loopback = allow_loopback

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Raises ForbiddenUrl, and OSError where the name does not resolve."""
        results = await self._inner.resolve(host, port, family)
        check_addresses(host, (result["host"] for result in results), allow_loopback=self._allow_loopback)
        return results

    async def close(self) -> None:
        await self._inner.close()


def open_session(*, allow_loopback: bool, resolver: AbstractResolver | None = None) -> aiohttp.ClientSession:
    """The session for such exchanges; call it where an event loop runs, and close it."""
    checked = CheckedResolver(resolver or aiohttp.ThreadedResolver(), allow_loopback=allow_loopback)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(resolver=checked),
        middlewares=(_send_once,),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"Accept-Encoding": "identity", "User-Agent": "modal-sdxl-lora"},
        auto_decompress=False,
        trust_env=False,
        read_bufsize=READ_BUFFER_BYTES,
    )


@asynccontextmanager
async def exchange(
    session: aiohttp.ClientSession,
    rules: HostRules,
    method: str,
    url: str,
    *,
    headers: Mapping[str, str],
    deadlines: Deadlines,
    body: bytes | None = None,
) -> AsyncIterator[aiohttp.ClientResponse]:
    """One request and its response, whose body is read inside the block.

    Raises ForbiddenUrl and ExchangeBroken, the latter for failures while the body is read too.
    """
    rules.check(url)
    timeout = aiohttp.ClientTimeout(
        total=deadlines.whole_s,
        connect=deadlines.connect_s,
        sock_connect=deadlines.connect_s,
        sock_read=deadlines.read_s,
    )
    try:
        async with session.request(
            method,
            URL(url, encoded=True),  # as it was signed
            headers=headers,
            data=None if body is None else io.BytesIO(body),
            allow_redirects=False,
            timeout=timeout,
        ) as response:
            yield response
    except (aiohttp.ClientError, TimeoutError) as error:
        # aiohttp puts whole URLs into some of its texts
        raise ExchangeBroken(_what_broke(error)) from None


def place_of(url: str) -> str:
    """A URL as messages and details may show it: without its query, its fragment and its userinfo."""
    try:
        return without_query(url)
    except ValueError:
        return "[not a URL]"


def retry_after_s(value: str | None, now: datetime) -> float | None:
    """Seconds that a Retry-After header (delta-seconds or HTTP-date) asks for; None where it says nothing legible."""
    if value is None:
        return None
    if value.isascii() and value.isdigit():
        return min(float(value), MAX_RETRY_AFTER_S)
    try:
        due = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    if due.tzinfo is None:
        due = due.replace(tzinfo=UTC)
    return min(max(0.0, (due - now).total_seconds()), MAX_RETRY_AFTER_S)


def _what_broke(error: Exception) -> str:
    match error:
        case TimeoutError():
            return "a deadline passed"
        case aiohttp.ClientConnectorDNSError():
            return "the name does not resolve"
        case aiohttp.ClientSSLError():
            return "TLS failed"
        case aiohttp.ClientConnectorError():
            return "no connection"
        case aiohttp.ClientPayloadError():
            return "the body is cut short or malformed"
        case _ConnectionLost():
            return f"the connection broke ({error})"
        case _:
            return f"the connection broke ({type(error).__name__})"
