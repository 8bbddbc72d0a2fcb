"""Where a job's PNG goes: into the project's own bucket, or to the caller's presigned URL."""

import hashlib
import json
from datetime import UTC, datetime

from consumer.attempt import Attempt
from consumer.errors import LeaseLost, UploadRefused
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
            self._uploads.check(url, datetime.fromtimestamp(attempt.begun.now_ms / 1000, UTC))

    def address(self, request: GenerationRequest) -> tuple[str | None, str | None]:
        """`image_url` and `image_key` of the stored picture."""
        if request.upload_url is not None:
            return without_query(request.upload_url), None
        return self._store.public_url(request.image_key), request.image_key

    async def store(self, attempt: Attempt, png: bytes) -> StoredArtifact:
        """Uploads `png`, or adopts what a crashed attempt of the same run has uploaded."""
        request = attempt.request
        artifact = StoredArtifact(
            sha256=hashlib.sha256(png).hexdigest(), size=len(png), seed=request.effective_seed, adopted=False
        )
        if request.upload_url is not None:
            return await self._put(attempt, request.upload_url, png, artifact)
        return await self._store.upload(
            request.job_id, attempt.run, request.image_key, png, artifact.sha256, artifact.seed
        )

    async def _put(self, attempt: Attempt, url: str, png: bytes, artifact: StoredArtifact) -> StoredArtifact:
        """A PUT that cannot be read back: what it carries is noted with the job first."""
        before = await self._note(attempt, artifact, confirmed=False)
        created = await self._uploads.put(url, png)
        if created:
            if before is not None and before.sha256 != artifact.sha256:
                await self._note(attempt, artifact, confirmed=True)
            return artifact
        if before is None:
            raise UploadRefused("another object is stored at the upload URL", retry_after_s=0)
        return before

    async def _note(self, attempt: Attempt, artifact: StoredArtifact, *, confirmed: bool) -> StoredArtifact | None:
        note = json.dumps({"sha256": artifact.sha256, "size": artifact.size, "seed": artifact.seed}).encode()
        before = await until_answered(
            lambda: self._leases.note_artifact(attempt.lease, note, confirmed=confirmed), what="note_artifact"
        )
        if before is None:
            raise LeaseLost
        return StoredArtifact(**json.loads(before), adopted=True) if before else None
