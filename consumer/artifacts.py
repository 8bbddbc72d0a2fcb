"""Where a job's PNG goes: into the project's own bucket, or to the caller's presigned URL."""

import asyncio
import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime

from consumer.attempt import Attempt
from consumer.errors import LeaseLost, UploadInterrupted, UploadRefused
from consumer.outage import until_answered
from consumer.queue import Leases
from consumer.storage import ArtifactStore, StoredArtifact, UploadUrls
from schemas.redact import without_query
from schemas.requests import GenerationRequest


class Artifacts:
    """Stores each picture once per run, whatever crashed before."""

    def __init__(self, store: ArtifactStore, uploads: UploadUrls, leases: Leases) -> None:
        self._store = store
        self._uploads = uploads
        self._leases = leases

    def check(self, attempt: Attempt) -> None:
        """Refuses, before any GPU time is spent, what could not be stored: raises UploadRefused, UploadInterrupted."""
        url = attempt.request.upload_url
        if url is None:
            self._store.check_configured()
        else:
            # by Redis' clock, since ours may be off
            self._uploads.check(url, datetime.fromtimestamp(attempt.begun.now_ms / 1000 + attempt.since_begin_s, UTC))

    def address(self, request: GenerationRequest) -> tuple[str | None, str | None]:
        """`image_url` and `image_key` of the stored picture."""
        if request.upload_url is not None:
            return without_query(request.upload_url), None
        return self._store.public_url(request.image_key), request.image_key

    async def store(self, attempt: Attempt, png: bytes) -> StoredArtifact:
        """Uploads `png`, or adopts what a crashed attempt of the same run has uploaded."""
        request = attempt.request
        sha256 = await asyncio.to_thread(_sha256, png)
        artifact = StoredArtifact(sha256, len(png), request.effective_seed, adopted=False)
        if request.upload_url is not None:
            return await self._put(attempt, request.upload_url, png, artifact)
        return await self._store.upload(
            request.job_id, attempt.run, request.image_key, png, artifact.sha256, artifact.seed
        )

    async def _put(self, attempt: Attempt, url: str, png: bytes, artifact: StoredArtifact) -> StoredArtifact:
        """A PUT to where we cannot read: what it carries is noted with the job before.

        Where an object stands already, it is the job's own if it has the ETag (the MD5 of a plain PUT) of what an
        attempt has noted, and then this picture takes its place. Otherwise it is somebody else's.
        """
        etag = await asyncio.to_thread(_md5, png)
        note = json.dumps(
            {"sha256": artifact.sha256, "size": artifact.size, "seed": artifact.seed, "run": attempt.run, "etag": etag}
        )
        noted = await until_answered(lambda: self._leases.note_upload(attempt.lease, note.encode()), what="note_upload")
        if noted is None:
            raise LeaseLost
        if await self._put_once_more(url, png):
            return artifact
        for known in dict.fromkeys([etag, *(json.loads(other)["etag"] for other in noted)]):
            if await self._uploads.put(url, png, replacing=known):
                return replace(artifact, adopted=known == etag)
        raise UploadRefused("another object is stored at the upload URL", retry_after_s=None)

    async def _put_once_more(self, url: str, png: bytes) -> bool:
        try:
            return await self._uploads.put(url, png)
        except UploadInterrupted as error:
            if "status" in error.details:
                raise
            # A connection that broke in the pool is no reason to draw again; if the PUT has landed, we find it there.
            return await self._uploads.put(url, png)


def _sha256(png: bytes) -> str:
    return hashlib.sha256(png).hexdigest()


def _md5(png: bytes) -> str:
    return hashlib.md5(png, usedforsecurity=False).hexdigest()
