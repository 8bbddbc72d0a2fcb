"""The storage: an object is written under `doctor/`, read by a presigned URL, written on conditions, and deleted."""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Mapping
from email.utils import parsedate_to_datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
)
from botocore.exceptions import ConnectionError as NoConnection

from producer.doctor.findings import Finding, Verdict
from producer.settings import ProducerSettings
from producer.storage import PresignedUrls
from schemas.net.http import DEFAULT_DEADLINES, ExchangeBroken, exchange, open_session, place_of
from schemas.net.urls import ForbiddenUrl, HostRules

if TYPE_CHECKING:
    from types_boto3_s3.client import S3Client

_BODY = b"written by doctor"
_MAX_BODY = 1024
_WARN_SKEW_S, _FAIL_SKEW_S = 60.0, 900.0  # S3 refuses what is signed 15 minutes ago or ahead
_CONDITIONS_MATTER = "Pictures could be overwritten: this project needs a store with conditional PUT."
_CLIENT_OPTIONS: Mapping[str, Any] = {"connect_timeout": 5, "read_timeout": 10, "retries": {"total_max_attempts": 1}}

_finding = partial(Finding, "storage")


async def check_storage(settings: ProducerSettings) -> list[Finding]:
    """Everything that pictures and LoRAs need of the bucket, tried on one small object."""
    storage = PresignedUrls.from_settings(settings)
    if storage is None:
        return [_unconfigured(settings)]
    client = await asyncio.to_thread(storage.client, **_CLIENT_OPTIONS)
    try:
        return await _Examination(client, storage, settings).run()
    finally:
        client.close()


def _unconfigured(settings: ProducerSettings) -> Finding:
    values = {
        "R2_ENDPOINT_URL": settings.r2_endpoint_url,
        "R2_BUCKET_NAME": settings.r2_bucket,
        "R2_ACCESS_KEY_ID": settings.r2_access_key_id,
        "R2_SECRET_ACCESS_KEY": settings.r2_secret_access_key,
    }
    missing = [name for name, value in values.items() if value is None]
    if len(missing) == len(values):
        return _finding("settings", Verdict.SKIPPED, "no R2_… variable is set: nothing can be signed or uploaded")
    return _finding("settings", Verdict.FAIL, f"{', '.join(missing)} not set", "Set all four, or none.")


class _Examination:
    """One run over one object of the bucket. The calls of boto3 run in threads."""

    def __init__(self, client: "S3Client", storage: PresignedUrls, settings: ProducerSettings) -> None:
        self._client = client
        self._storage = storage
        self._settings = settings
        self._endpoint = place_of(settings.r2_endpoint_url or "")
        self._may_be_there = False
        self._key = f"doctor/{uuid.uuid4().hex}"

    async def run(self) -> list[Finding]:
        try:
            findings = await self._examine()
        finally:
            left_behind = await self._delete()
        return findings + left_behind

    async def _examine(self) -> list[Finding]:
        before_s = time.time()
        self._may_be_there = True
        try:
            written = await self._put(IfNoneMatch="*")
        except ClientError as error:
            self._may_be_there = False
            return [_refused("write", error), *_clock(error.response, before_s)]
        except BotoCoreError as error:
            self._may_be_there = not isinstance(error, EndpointConnectionError | ConnectTimeoutError)
            hint = "Look at R2_ENDPOINT_URL and the network."
            unreachable = isinstance(error, HTTPClientError | NoConnection)
            found = f"{self._endpoint} cannot be used ({type(error).__name__})"
            return [_finding("write", Verdict.FAIL, found, hint, out_of_reach=unreachable)]
        return [
            _finding("write", Verdict.OK, f"{self._endpoint}/{self._storage.bucket} takes an object"),
            *_clock(written, before_s),
            await self._presigned_get(),
            await self._guarded("If-None-Match", self._create_only()),
            await self._guarded("If-Match", self._replace_only(written["ETag"])),
        ]

    async def _guarded(self, check: str, found: Awaitable[Finding]) -> Finding:
        try:
            return await found
        except ClientError as error:
            return _refused(check, error, hint=_CONDITIONS_MATTER)
        except BotoCoreError as error:
            return _finding(check, Verdict.FAIL, type(error).__name__)

    async def _create_only(self) -> Finding:
        if await self._takes(IfNoneMatch="*"):
            return _finding("If-None-Match", Verdict.FAIL, "ignored: an object was overwritten", _CONDITIONS_MATTER)
        return _finding("If-None-Match", Verdict.OK, "keeps what is there (412)")

    async def _replace_only(self, etag: str) -> Finding:
        if await self._takes(IfMatch=f'"{"0" * 32}"'):
            return _finding("If-Match", Verdict.FAIL, "ignored: another object was overwritten", _CONDITIONS_MATTER)
        if not await self._takes(IfMatch=etag):
            return _finding("If-Match", Verdict.FAIL, "refuses the object's own ETag", "A rerun could not be stored.")
        return _finding("If-Match", Verdict.OK, "replaces only the object that it names")

    async def _presigned_get(self) -> Finding:
        settings, url = self._settings, self._storage.lora_url(self._key, 60)
        rules = HostRules.own(settings.r2_endpoint_url, settings.r2_bucket, allow_loopback=settings.allow_loopback)
        try:
            async with (
                open_session(allow_loopback=settings.allow_loopback) as session,
                exchange(session, rules, "GET", url, headers={}, deadlines=DEFAULT_DEADLINES) as response,
            ):
                status, body = response.status, await response.content.read(_MAX_BODY)
        except ForbiddenUrl as error:
            hint = "Consumers fetch LoRAs by https from public addresses only (LORA_ALLOW_LOOPBACK is for tests)."
            return _finding("presigned GET", Verdict.FAIL, f"consumers would refuse it: {error}", hint)
        except ExchangeBroken as error:
            return _finding("presigned GET", Verdict.FAIL, str(error))
        if status == 200 and body == _BODY:
            return _finding("presigned GET", Verdict.OK, "reads the object")
        problem = "another body than was written" if status == 200 else f"answered {status}"
        return _finding("presigned GET", Verdict.FAIL, problem, "Presigned URLs of LoRAs do not work with this store.")

    async def _takes(self, **condition: str) -> bool:
        try:
            await self._put(**condition)
        except ClientError as error:
            if _status(error) != 412:
                raise
            return False
        return True

    async def _put(self, **condition: str) -> Mapping[str, Any]:
        put: Any = partial(self._client.put_object, Bucket=self._storage.bucket, Key=self._key, Body=_BODY)
        written: Mapping[str, Any] = await asyncio.to_thread(put, **condition)
        return written

    async def _delete(self) -> list[Finding]:
        if not self._may_be_there:
            return []
        try:
            await asyncio.to_thread(self._client.delete_object, Bucket=self._storage.bucket, Key=self._key)
        except (BotoCoreError, ClientError) as error:
            found = f"{self._key} stays behind ({type(error).__name__})"
            return [_finding("delete", Verdict.WARN, found, "Delete it by hand.")]
        return []


def _refused(check: str, error: ClientError, hint: str | None = None) -> Finding:
    code = error.response.get("Error", {}).get("Code", "")
    hints = {
        401: "Look at R2_ACCESS_KEY_ID and R2_SECRET_ACCESS_KEY.",
        403: "Look at R2_ACCESS_KEY_ID and R2_SECRET_ACCESS_KEY: a wrong one, or one that may not write here.",
        404: "Look at R2_BUCKET_NAME: is there such a bucket?",
    }
    status = _status(error)
    found = f"the storage answered {status} {code if code != str(status) else ''}"
    return _finding(check, Verdict.FAIL, found, hint or hints.get(status))


def _clock(response: Mapping[str, Any], before_s: float) -> list[Finding]:
    try:
        server_s = parsedate_to_datetime(response["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()
    except (KeyError, ValueError):
        return [_finding("clock", Verdict.SKIPPED, "the storage does not tell its time")]
    # its header has whole seconds
    skew_s = max(0.0, abs(server_s + 0.5 - (before_s + time.time()) / 2) - 0.5)
    if skew_s < _WARN_SKEW_S:
        return [_finding("clock", Verdict.OK, "agrees with this host's")]
    verdict = Verdict.WARN if skew_s < _FAIL_SKEW_S else Verdict.FAIL
    hint = "Set this host's clock by NTP: what it signs is dated wrong, and is refused from 15 minutes on."
    return [_finding("clock", verdict, f"{skew_s:.0f} s apart", hint)]


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
