"""From a reference to a file on disk: the allow-list, the cache, one conditional GET."""

import asyncio
import errno
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

import structlog
from aiohttp import ClientResponse, ClientSession
from pydantic import JsonValue

from consumer.errors import LoraFetchInterrupted, LoraRefused, LoraUrlExpired, WorkerError
from consumer.lora.cache import CachedLora, LoraCache, is_cacheable, object_id
from consumer.presigned import MAX_CLOCK_SKEW, LifetimeForbidden, read_lifetime
from schemas.net.http import (
    DEFAULT_DEADLINES,
    Clock,
    Deadlines,
    ExchangeBroken,
    exchange,
    place_of,
    retry_after_s,
    utc_now,
)
from schemas.net.urls import ForbiddenUrl, HostRules
from schemas.requests import LoraRef

CHUNK_BYTES = 1 << 20
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class OwnBucketReader:
    """How a `lora_key` is read: `presign_get` makes a URL of it, which `rules` allow."""

    presign_get: Callable[[str], str]
    rules: HostRules


class LoraFetcher:
    """Fetches the files of LoRAs. `max_bytes`: the largest file that is taken."""

    def __init__(
        self,
        session: ClientSession,
        cache: LoraCache,
        *,
        rules: HostRules,
        own_bucket: OwnBucketReader | None,
        max_bytes: int,
        deadlines: Deadlines = DEFAULT_DEADLINES,
        now: Clock = utc_now,
    ) -> None:
        self._session = session
        self._cache = cache
        self._rules = rules
        self._own_bucket = own_bucket
        self._max_bytes = max_bytes
        self._deadlines = deadlines
        self._now = now

    @asynccontextmanager
    async def fetch(self, ref: LoraRef) -> AsyncIterator[Path]:
        """The LoRA's file, immutable, and readable until the block ends.

        Raises LoraRefused, LoraUrlExpired and LoraFetchInterrupted.
        """
        url, rules = self._locate(ref)
        with self._cache.lease() as path:
            await self._fill(path, url, rules, ref.sha256)
            yield path

    def _locate(self, ref: LoraRef) -> tuple[str, HostRules]:
        if ref.url is not None:
            return ref.url, self._rules
        if self._own_bucket is None:
            raise LoraFetchInterrupted(
                "a LoRA named by its key needs R2_ENDPOINT_URL, R2_BUCKET_NAME, R2_ACCESS_KEY_ID, R2_SECRET_ACCESS_KEY"
            )
        return self._own_bucket.presign_get(ref.key or ""), self._own_bucket.rules

    async def _fill(self, path: Path, url: str, rules: HostRules, wanted_sha256: str | None) -> None:
        details: dict[str, JsonValue] = {"url": place_of(url)}
        try:
            rules.check(url)
            _check_lifetime(url, self._now())
            await self._with_room(lambda: self._take_or_get(path, url, rules, wanted_sha256))
        except ForbiddenUrl as error:
            raise LoraRefused(f"the LoRA's URL is not allowed: {error}", details=details) from None
        except ExchangeBroken as error:
            raise LoraFetchInterrupted(f"fetching the LoRA failed: {error}", details=details) from None
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            raise LoraFetchInterrupted("no space left on the consumer's disk", details=details) from None

    async def _with_room(self, fetch: Callable[[], Awaitable[None]]) -> None:
        """`fetch()`, once more without what is cached where the disk is full."""
        try:
            await fetch()
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            log.warning("lora_cache_out_of_space", reason=error.strerror)
            await self._cache.evict(everything=True)
            await fetch()

    async def _take_or_get(self, path: Path, url: str, rules: HostRules, wanted_sha256: str | None) -> None:
        cached = await self._cache.take(object_id(url), path)
        await self._get(path, url, rules, cached, wanted_sha256)

    async def _get(
        self, path: Path, url: str, rules: HostRules, cached: CachedLora | None, wanted_sha256: str | None
    ) -> None:
        headers = {} if cached is None else {"If-None-Match": cached.etag}
        async with exchange(self._session, rules, "GET", url, headers=headers, deadlines=self._deadlines) as response:
            if cached is not None and response.status == 304:
                _check_sha256(cached.sha256, wanted_sha256, url)
                return
            if response.status != 200:
                raise _failure(response, url, self._now())
            etag = response.headers.get("ETag")
            sha256 = await self._save(response, path, url)
        _check_sha256(sha256, wanted_sha256, url)
        if etag is not None and is_cacheable(etag):
            await self._cache.publish(CachedLora(object_id(url), etag, sha256), path)

    async def _save(self, response: ClientResponse, path: Path, url: str) -> str:
        """Streams the body to a new file; returns its SHA-256 in hex."""
        self._check_size(response.content_length or 0, url)
        with _HashedFile(path) as file:
            async for chunk in response.content.iter_chunked(CHUNK_BYTES):
                self._check_size(file.size + len(chunk), url)
                await asyncio.to_thread(file.write, chunk)
            return file.sha256

    def _check_size(self, size: int, url: str) -> None:
        if size > self._max_bytes:
            raise LoraRefused(
                f"the LoRA is larger than {self._max_bytes} bytes",
                details={"url": place_of(url), "bytes": size, "max_bytes": self._max_bytes},
            )


class _HashedFile:
    """A new file, hashed while it is written. `write` is called from one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self.size = 0

    def __enter__(self) -> Self:
        self._path.unlink(missing_ok=True)  # never write into what the cache holds under another name
        self._file = self._path.open("xb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._digest.update(chunk)
        self.size += len(chunk)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def _check_lifetime(url: str, now: datetime) -> None:
    """Refuses what S3 would refuse, though a laxer store might not.

    What is signed in another way, or not at all, is for its host to judge; so is what our clock may be wrong about.
    Raises LifetimeForbidden and LoraUrlExpired.
    """
    try:
        lifetime = read_lifetime(url)
    except LifetimeForbidden:
        raise
    except ForbiddenUrl:
        return
    if lifetime.ends <= now - MAX_CLOCK_SKEW:
        raise LoraUrlExpired("the LoRA's URL has expired", details={"url": place_of(url)})
    if lifetime.begins is not None and lifetime.begins - now > MAX_CLOCK_SKEW:
        raise LoraUrlExpired("the LoRA's URL is dated in the future", details={"url": place_of(url)})


def _check_sha256(sha256: str, wanted: str | None, url: str) -> None:
    if wanted is not None and wanted.lower() != sha256:
        raise LoraRefused(
            "the LoRA's file does not have the digest that the request names",
            details={"url": place_of(url), "sha256": sha256, "wanted_sha256": wanted.lower()},
        )


def _failure(response: ClientResponse, url: str, now: datetime) -> WorkerError:
    """What the contract makes of a status that brings no file."""
    status = response.status
    details: dict[str, JsonValue] = {"status": status, "url": place_of(url)}
    message = f"the LoRA's host answered {status}"
    if status in (401, 403):
        return LoraUrlExpired(f"{message}: the URL has expired, or its signature is wrong", details=details)
    if status == 304:
        return LoraFetchInterrupted(f"{message} without having been asked for news", details=details)
    if 300 <= status < 500 and status != 429:
        return LoraRefused(message, details=details)
    delay_s = retry_after_s(response.headers.get("Retry-After"), now)
    return LoraFetchInterrupted(message, details=details, delay_s=delay_s)
