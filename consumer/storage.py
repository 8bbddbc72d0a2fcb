"""Where PNGs go: the project's own bucket, or an upload URL that the caller has signed."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Self
from urllib.parse import quote

from aiohttp import ClientSession
from botocore.exceptions import BotoCoreError, ClientError
from pydantic import JsonValue

from consumer.bucket import OwnBucket
from consumer.errors import LeaseLost, UploadInterrupted, UploadRefused, WorkerError
from consumer.presigned import MAX_CLOCK_SKEW, MAX_LIFETIME_S, read_lifetime
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

CONTENT_TYPE = "image/png"


@dataclass(frozen=True, slots=True)
class StoredArtifact:
    """The PNG that is visible in the storage. `adopted`: an earlier attempt had put it there."""

    sha256: str
    size: int
    seed: int
    adopted: bool


@dataclass(frozen=True, slots=True)
class _Stamp:
    """Which job's and run's object this is: what its metadata says."""

    job_id: str
    run: int
    sha256: str
    seed: int

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> Self | None:
        try:
            return cls(metadata["job-id"], int(metadata["run"]), metadata["sha256"], int(metadata["seed"]))
        except (KeyError, ValueError):
            return None

    @property
    def metadata(self) -> dict[str, str]:
        return {"job-id": self.job_id, "run": str(self.run), "sha256": self.sha256, "seed": str(self.seed)}


class ArtifactStore:
    """Puts PNGs into the project's own bucket, one visible object per job and run."""

    def __init__(self, bucket: OwnBucket, *, public_url: str | None = None, now: Clock = utc_now) -> None:
        self._bucket = bucket
        self._public_url = public_url
        self._now = now

    def check_configured(self) -> None:
        """Raises UploadInterrupted, naming what is missing."""
        if self._bucket.missing:
            raise UploadInterrupted(f"the storage is not configured: {', '.join(self._bucket.missing)} missing")

    def public_url(self, key: str) -> str | None:
        """Where the public finds the object; None without R2_PUBLIC_URL."""
        return None if self._public_url is None else f"{self._public_url}/{quote(key, safe='/~')}"

    async def upload(self, job_id: str, run: int, key: str, png: bytes, sha256_hex: str, seed: int) -> StoredArtifact:
        """Stores `png` at `key`, replaces an older run's object, adopts this run's own.

        Raises UploadInterrupted, UploadRefused where the key holds something else, and LeaseLost where it holds a
        newer run's object.
        """
        self.check_configured()
        stamp = _Stamp(job_id, run, sha256_hex, seed)
        try:
            return await asyncio.to_thread(self._upload, key, png, stamp)
        except ClientError as error:
            raise self._interrupted(error, key) from None
        except BotoCoreError as error:
            message = f"the storage cannot be reached ({type(error).__name__})"
            raise UploadInterrupted(message, details={"key": key}) from None

    def _upload(self, key: str, png: bytes, stamp: _Stamp) -> StoredArtifact:
        stored = StoredArtifact(stamp.sha256, len(png), stamp.seed, adopted=False)
        put = partial(
            self._bucket.client.put_object,
            Bucket=self._bucket.name,
            Key=key,
            Body=png,
            ContentType=CONTENT_TYPE,
            Metadata=stamp.metadata,
        )
        try:
            put(IfNoneMatch="*")
        except ClientError as error:
            if _status(error) != 412:
                raise
        else:
            return stored
        there = self._bucket.client.head_object(Bucket=self._bucket.name, Key=key)
        found = _Stamp.read(there["Metadata"])
        if found is None or found.job_id != stamp.job_id:
            raise UploadRefused("another object is stored at this key", retry_after_s=None, details={"key": key})
        if found.run > stamp.run:
            raise LeaseLost(f"run {found.run} has stored its picture already")
        if found.run == stamp.run:
            return StoredArtifact(found.sha256, there["ContentLength"], found.seed, adopted=True)
        put(IfMatch=there["ETag"])
        return stored

    def _interrupted(self, error: ClientError, key: str) -> WorkerError:
        status = _status(error)
        headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        return UploadInterrupted(
            f"the storage answered {status} {error.response.get('Error', {}).get('Code', '')}".rstrip(),
            details={"status": status, "key": key},
            delay_s=retry_after_s(headers.get("retry-after"), self._now()),
        )


class UploadUrls:
    """Puts PNGs to presigned URLs."""

    def __init__(
        self,
        session: ClientSession,
        rules: HostRules,
        *,
        deadlines: Deadlines = DEFAULT_DEADLINES,
        now: Clock = utc_now,
    ) -> None:
        self._session = session
        self._rules = rules
        self._deadlines = deadlines
        self._now = now

    def check(self, url: str, now: datetime) -> None:
        """Refuses what the store would refuse anyway, before any GPU time is spent.

        Raises UploadRefused, whose `retry_after_s` is 0 where a freshly signed URL helps.
        """
        details: dict[str, JsonValue] = {"url": place_of(url)}
        try:
            self._rules.check(url)
            lifetime = read_lifetime(url)
            if (lifetime.ends - (lifetime.begins or now)).total_seconds() > MAX_LIFETIME_S:
                raise ForbiddenUrl(f"it is valid for more than {MAX_LIFETIME_S} s")
        except ForbiddenUrl as error:
            message = f"the upload URL is not allowed: {error}"
            raise UploadRefused(message, retry_after_s=None, details=details) from None
        if lifetime.ends <= now:
            raise UploadRefused("the upload URL has expired", retry_after_s=0, details=details)
        if lifetime.begins is not None and lifetime.begins - now > MAX_CLOCK_SKEW:
            raise UploadRefused("the upload URL is dated in the future", retry_after_s=0, details=details)

    async def put(self, url: str, png: bytes, *, replacing: str | None = None) -> bool:
        """Whether this PUT has created the object, or replaced the one with the ETag `replacing`.

        False where another one is there. Raises UploadRefused and UploadInterrupted.
        """
        details: dict[str, JsonValue] = {"url": place_of(url)}
        # No x-amz-* header: S3 refuses those that were not signed.
        condition = {"If-None-Match": "*"} if replacing is None else {"If-Match": f'"{replacing}"'}
        headers = {"Content-Type": CONTENT_TYPE, **condition}
        try:
            async with exchange(
                self._session, self._rules, "PUT", url, headers=headers, deadlines=self._deadlines, body=png
            ) as response:
                status, retry_after = response.status, response.headers.get("Retry-After")
        except ForbiddenUrl as error:
            message = f"the upload URL is not allowed: {error}"
            raise UploadRefused(message, retry_after_s=None, details=details) from None
        except ExchangeBroken as error:
            raise UploadInterrupted(f"the upload failed: {error}", details=details) from None
        if 200 <= status < 300:
            return True
        if status == 412:
            return False
        raise self._failure(status, retry_after, details)

    def _failure(self, status: int, retry_after: str | None, details: dict[str, JsonValue]) -> WorkerError:
        message = f"the upload URL's host answered {status}"
        details = {"status": status, **details}
        if 300 <= status < 400:
            return UploadRefused(message, retry_after_s=None, details=details)
        if status in (401, 403):
            return UploadRefused(message, retry_after_s=0, details=details)
        return UploadInterrupted(message, details=details, delay_s=retry_after_s(retry_after, self._now()))


def _status(error: ClientError) -> int:
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
