"""Pictures that go to a presigned URL, which cannot be read back: notes in a real Redis, objects in a real S3."""

import hashlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis

from consumer.artifacts import Artifacts
from consumer.attempt import Attempt
from consumer.bucket import OwnBucket
from consumer.errors import LeaseLost, UploadInterrupted, UploadRefused
from consumer.storage import ArtifactStore, UploadUrls
from demo.servers import S3Server
from schemas.keys import Keys
from schemas.net.http import open_session
from schemas.net.urls import HostRules
from tests.integration.queue_kit import FakeConsumer, a_request, publish

BUCKET = "uploads"


class Bench:
    """A job whose picture goes to one upload URL, in as many attempts and runs as a test wants."""

    def __init__(self, redis: Redis, keys: Keys, s3: S3Server, artifacts: Artifacts, ann: FakeConsumer) -> None:
        self.redis, self.keys, self.s3, self.artifacts, self.ann = redis, keys, s3, artifacts, ann
        self.object = f"{keys.prefix}.png"
        put = {"Bucket": BUCKET, "Key": self.object}
        self.url = str(s3.client().generate_presigned_url("put_object", Params=put, ExpiresIn=600))

    async def begin(self, run: int = 1) -> Attempt:
        request = a_request(upload_url=self.url)
        await publish(self.redis, self.keys, request, run=run)
        lease, begun = await self.ann.take()
        return Attempt(lease, request, run, begun)

    async def begin_again(self, attempt: Attempt) -> Attempt:
        lease, begun = await self.ann.begin(attempt.lease.delivery)
        return Attempt(lease, attempt.request, attempt.run, begun)

    @property
    def stored(self) -> bytes:
        body: Any = self.s3.client().get_object(Bucket=BUCKET, Key=self.object)["Body"]
        return bytes(body.read())


@pytest.fixture
async def bench(redis: Redis, keys: Keys, s3_at: S3Server) -> AsyncIterator[Bench]:
    s3_at.create_bucket(BUCKET)
    ann = FakeConsumer(redis, keys, "ann")
    own = HostRules.own(s3_at.url, BUCKET, allow_loopback=True)
    nothing = OwnBucket(endpoint_url=None, name=None, access_key_id=None, secret_access_key=None)
    async with open_session(allow_loopback=True) as session:
        artifacts = Artifacts(ArtifactStore(nothing), UploadUrls(session, own), ann.leases)
        yield Bench(redis, keys, s3_at, artifacts, ann)


async def test_a_picture_is_created_once(bench: Bench) -> None:
    attempt = await bench.begin()
    stored = await bench.artifacts.store(attempt, b"picture")
    assert (stored.sha256, stored.size, stored.adopted) == (hashlib.sha256(b"picture").hexdigest(), 7, False)
    assert bench.stored == b"picture"


async def test_what_a_crashed_attempt_has_uploaded_is_adopted(bench: Bench) -> None:
    crashed = await bench.begin()
    await bench.artifacts.store(crashed, b"picture")
    stored = await bench.artifacts.store(await bench.begin_again(crashed), b"picture")
    assert (stored.sha256, stored.adopted) == (hashlib.sha256(b"picture").hexdigest(), True)


async def test_the_digest_is_the_stored_pictures_though_attempts_drew_different_bytes(bench: Bench) -> None:
    first = await bench.begin()
    await bench.ann.leases.note_upload(first.lease, b'{"etag": "0"}')  # noted, and died before the PUT
    second = await bench.begin_again(first)
    await bench.artifacts.store(second, b"drawn on one GPU")  # and died before the finish
    stored = await bench.artifacts.store(await bench.begin_again(second), b"drawn on another")
    assert hashlib.sha256(bench.stored).hexdigest() == stored.sha256


async def test_a_later_run_replaces_the_picture_of_an_earlier_one(bench: Bench) -> None:
    first = await bench.begin()
    await bench.artifacts.store(first, b"landed late")
    await bench.ann.fail(first.lease)
    stored = await bench.artifacts.store(await bench.begin(run=2), b"second run")
    assert bench.stored == b"second run"
    assert stored.sha256 == hashlib.sha256(b"second run").hexdigest()


@pytest.mark.parametrize("noted", [False, True])
async def test_somebody_elses_object_is_never_replaced(bench: Bench, noted: bool) -> None:
    bench.s3.client().put_object(Bucket=BUCKET, Key=bench.object, Body=b"theirs")
    attempt = await bench.begin()
    if noted:
        await bench.ann.leases.note_upload(attempt.lease, b'{"etag": "0"}')
        attempt = await bench.begin_again(attempt)
    with pytest.raises(UploadRefused) as caught:
        await bench.artifacts.store(attempt, b"ours")
    assert caught.value.retry_after_s is None
    assert bench.stored == b"theirs"


@pytest.mark.parametrize("landed", [True, False])
async def test_a_put_without_an_answer_is_sent_again_within_the_attempt(bench: Bench, landed: bool) -> None:
    class Losing(UploadUrls):
        lost = False

        async def put(self, url: str, png: bytes, *, replacing: str | None = None) -> bool:
            if Losing.lost:
                return await super().put(url, png, replacing=replacing)
            Losing.lost = True
            if landed:
                await super().put(url, png, replacing=replacing)
            raise UploadInterrupted("the upload failed: the connection broke", details={"url": "…"})

    uploads = bench.artifacts._uploads
    bench.artifacts._uploads = Losing(uploads._session, uploads._rules)
    stored = await bench.artifacts.store(await bench.begin(), b"picture")
    assert bench.stored == b"picture"
    assert (stored.sha256, stored.adopted) == (hashlib.sha256(b"picture").hexdigest(), landed)


async def test_a_lost_lease_uploads_nothing(bench: Bench) -> None:
    lost = await bench.begin()
    await bench.begin_again(lost)
    with pytest.raises(LeaseLost):
        await bench.artifacts.store(lost, b"late")
    assert "Contents" not in bench.s3.client().list_objects_v2(Bucket=BUCKET, Prefix=bench.object)
