"""PNGs into a real S3 over HTTP, one visible object per job and run, and to presigned URLs."""

import asyncio
import hashlib
import socket
import traceback
import uuid
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import SecretStr

from consumer.bucket import BucketNotConfigured, OwnBucket
from consumer.errors import LeaseLost, UploadInterrupted, UploadRefused
from consumer.storage import ArtifactStore, StoredArtifact, UploadUrls
from demo.servers import S3Server
from schemas.net.http import Deadlines, open_session
from schemas.net.urls import HostRules
from tests.s3_stub import ACCESS_KEY, SECRET_KEY, Reply, S3Stub, reset, silence, status

PNG = b"\x89PNG\r\n\x1a\n" + bytes(3 << 20)  # aiohttp warns of bodies above 1 MiB that are sent as plain bytes
SHA256 = hashlib.sha256(PNG).hexdigest()
KEY = "images/job.png"
BUCKET = "pictures"
NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)


def bucket_at(url: str, name: str, access_key: str, secret_key: str) -> OwnBucket:
    return OwnBucket(
        endpoint_url=url,
        name=name,
        access_key_id=SecretStr(access_key),
        secret_access_key=SecretStr(secret_key),
    )


@pytest.fixture
def bucket(s3_at: S3Server) -> Iterator[OwnBucket]:
    name = f"t{uuid.uuid4().hex[:12]}"
    s3_at.create_bucket(name)
    bucket = bucket_at(s3_at.url, name, s3_at.access_key, s3_at.secret_key)
    yield bucket
    bucket.close()


@pytest.fixture
def stub_bucket(stub: S3Stub) -> Iterator[OwnBucket]:
    bucket = bucket_at(stub.url, BUCKET, ACCESS_KEY, SECRET_KEY)
    yield bucket
    bucket.close()


async def upload(
    bucket: OwnBucket, *, job_id: str = "job", run: int = 1, png: bytes = PNG, seed: int = 7
) -> StoredArtifact:
    sha256 = hashlib.sha256(png).hexdigest()
    return await ArtifactStore(bucket, now=lambda: NOW).upload(job_id, run, KEY, png, sha256, seed)


def stored(bucket: OwnBucket) -> Any:
    return bucket.client.get_object(Bucket=bucket.name, Key=KEY)


async def test_a_picture_is_stored_with_its_type_and_whose_it_is(bucket: OwnBucket) -> None:
    assert await upload(bucket) == StoredArtifact(SHA256, len(PNG), 7, adopted=False)
    there = stored(bucket)
    assert there["Body"].read() == PNG
    assert there["ContentType"] == "image/png"
    assert there["Metadata"] == {"job-id": "job", "run": "1", "sha256": SHA256, "seed": "7"}


async def test_the_same_runs_earlier_picture_is_adopted(bucket: OwnBucket) -> None:
    await upload(bucket)
    assert await upload(bucket, png=b"drawn again", seed=8) == StoredArtifact(SHA256, len(PNG), 7, adopted=True)
    assert stored(bucket)["Body"].read() == PNG


async def test_an_older_runs_picture_is_replaced(bucket: OwnBucket) -> None:
    await upload(bucket, run=1)
    assert not (await upload(bucket, run=2, png=b"second")).adopted
    there = stored(bucket)
    assert there["Body"].read() == b"second"
    assert there["Metadata"]["run"] == "2"


async def test_a_newer_runs_picture_means_that_the_lease_is_lost(bucket: OwnBucket) -> None:
    await upload(bucket, run=2)
    with pytest.raises(LeaseLost):
        await upload(bucket, run=1, png=b"late")
    assert stored(bucket)["Body"].read() == PNG


async def test_another_jobs_picture_is_never_touched(bucket: OwnBucket) -> None:
    await upload(bucket, job_id="other")
    with pytest.raises(UploadRefused) as caught:
        await upload(bucket, run=5, png=b"mine")
    assert caught.value.retry_after_s is None
    assert stored(bucket)["Body"].read() == PNG


@pytest.mark.parametrize(
    "metadata", [{}, {"job-id": "job", "run": "first", "sha256": SHA256, "seed": "7"}, {"job-id": "job", "run": "1"}]
)
async def test_an_object_that_does_not_say_whose_it_is_is_never_touched(
    bucket: OwnBucket, metadata: dict[str, str]
) -> None:
    bucket.client.put_object(Bucket=bucket.name, Key=KEY, Body=b"foreign", Metadata=metadata)
    with pytest.raises(UploadRefused):
        await upload(bucket)
    assert stored(bucket)["Body"].read() == b"foreign"


async def test_runs_that_race_leave_the_newest_picture(bucket: OwnBucket) -> None:
    runs = [upload(bucket, run=run, png=f"run {run}".encode()) for run in (1, 2, 3)]
    outcomes = await asyncio.gather(*runs, return_exceptions=True)
    assert all(isinstance(outcome, StoredArtifact | LeaseLost | UploadInterrupted) for outcome in outcomes)
    await upload(bucket, run=3, png=b"run 3")  # as its job does when it was interrupted
    for run in (1, 2):
        with pytest.raises(LeaseLost):
            await upload(bucket, run=run, png=b"late")
    assert stored(bucket)["Body"].read() == b"run 3"


async def test_a_bucket_that_is_not_there_is_tried_again(s3_at: S3Server) -> None:
    absent = bucket_at(s3_at.url, "absent", s3_at.access_key, s3_at.secret_key)
    with pytest.raises(UploadInterrupted, match="404 NoSuchBucket") as caught:
        await upload(absent)
    assert caught.value.details == {"status": 404, "key": KEY}
    absent.close()


async def test_a_lost_reply_is_followed_by_adoption(stub: S3Stub, stub_bucket: OwnBucket) -> None:
    whose = {"x_amz_meta_job_id": "job", "x_amz_meta_run": "1", "x_amz_meta_sha256": SHA256, "x_amz_meta_seed": "7"}
    whose["Content_Length"] = str(len(PNG))
    stub.answer(f"/{BUCKET}/{KEY}", reset(), status(412), status(200, **whose))
    assert await upload(stub_bucket) == StoredArtifact(SHA256, len(PNG), 7, adopted=True)
    assert [seen.method for seen in stub.seen] == ["PUT", "PUT", "HEAD"]


async def test_an_object_that_changes_between_look_and_replacement_is_tried_again(
    stub: S3Stub, stub_bucket: OwnBucket
) -> None:
    whose = {"x_amz_meta_job_id": "job", "x_amz_meta_run": "1", "x_amz_meta_sha256": SHA256, "x_amz_meta_seed": "7"}
    stub.answer(f"/{BUCKET}/{KEY}", status(412), status(200, ETag='"seen"', **whose), status(412))
    with pytest.raises(UploadInterrupted, match="412"):
        await upload(stub_bucket, run=2)
    assert stub.seen[2].headers["If-Match"] == '"seen"'


@pytest.mark.parametrize("code", [400, 401, 403, 409, 503])
async def test_a_storage_that_refuses_or_is_busy_is_tried_again_when_it_says(
    stub: S3Stub, stub_bucket: OwnBucket, code: int
) -> None:
    stub.answer(f"/{BUCKET}/{KEY}", status(code, Retry_After="9"))
    with pytest.raises(UploadInterrupted, match=str(code)) as caught:
        await upload(stub_bucket)
    assert (caught.value.retry_after_s, caught.value.delay_s) == (60, 9)


async def test_a_storage_that_is_down_is_tried_again() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        bucket = bucket_at(f"http://127.0.0.1:{unused.getsockname()[1]}", BUCKET, ACCESS_KEY, SECRET_KEY)
        with pytest.raises(UploadInterrupted, match="cannot be reached") as caught:
            await upload(bucket)
    assert SECRET_KEY not in str(caught.value)
    bucket.close()


async def test_no_checksum_is_sent_that_a_store_may_refuse(stub: S3Stub, stub_bucket: OwnBucket) -> None:
    stub.answer(f"/{BUCKET}/{KEY}", status(200))
    await upload(stub_bucket)
    (seen,) = stub.seen
    assert seen.body == PNG
    assert seen.headers["If-None-Match"] == "*"
    assert not [name for name in seen.headers if "checksum" in name.lower() or "trailer" in name.lower()]


async def test_without_credentials_an_upload_names_the_missing_variables() -> None:
    bucket = OwnBucket(
        endpoint_url="https://s3.example", name=None, access_key_id=SecretStr("k"), secret_access_key=None
    )
    store = ArtifactStore(bucket)
    for attempt in (store.upload("job", 1, KEY, PNG, SHA256, 7), _checked(store)):
        with pytest.raises(UploadInterrupted, match="R2_BUCKET_NAME, R2_SECRET_ACCESS_KEY missing"):
            await attempt
    with pytest.raises(BucketNotConfigured, match="R2_BUCKET_NAME"):
        bucket.presign_get(KEY)
    bucket.close()


async def _checked(store: ArtifactStore) -> None:
    store.check_configured()


def test_a_public_url_is_quoted_and_absent_where_none_is_configured(bucket: OwnBucket) -> None:
    assert ArtifactStore(bucket).public_url(KEY) is None
    store = ArtifactStore(bucket, public_url="https://cdn.example")
    assert store.public_url("a b/ü?#.png") == "https://cdn.example/a%20b/%C3%BC%3F%23.png"


@pytest.fixture
async def uploads(stub: S3Stub) -> AsyncIterator[UploadUrls]:
    session = open_session(allow_loopback=True)
    rules = HostRules.own(stub.url, BUCKET, allow_loopback=True)
    yield UploadUrls(session, rules, deadlines=Deadlines(read_s=0.3, whole_s=20), now=lambda: NOW)
    await session.close()


def put_url(stub: S3Stub, key: str = KEY) -> str:
    return stub.presign("PUT", f"/{BUCKET}/{key}")


async def test_a_put_creates_the_object_once(stub: S3Stub, uploads: UploadUrls) -> None:
    assert await uploads.put(put_url(stub), PNG) is True
    assert stub.objects[f"/{BUCKET}/{KEY}"].body == PNG
    assert stub.objects[f"/{BUCKET}/{KEY}"].content_type == "image/png"
    assert await uploads.put(put_url(stub), b"another") is False
    assert stub.objects[f"/{BUCKET}/{KEY}"].body == PNG


async def test_a_put_sends_no_header_that_the_signature_would_have_to_cover(stub: S3Stub, uploads: UploadUrls) -> None:
    await uploads.put(put_url(stub), PNG)
    names = {name.lower() for name in stub.seen[0].headers}
    assert not [name for name in names if name.startswith("x-amz-")]
    assert stub.seen[0].headers["Content-Length"] == str(len(PNG))


async def test_moto_takes_the_same_put_once(s3_at: S3Server, bucket: OwnBucket) -> None:
    url = bucket.client.generate_presigned_url("put_object", Params={"Bucket": bucket.name, "Key": KEY})
    async with open_session(allow_loopback=True) as session:
        uploads = UploadUrls(session, HostRules.own(s3_at.url, bucket.name, allow_loopback=True))
        uploads.check(url, datetime.now(UTC))
        assert await uploads.put(url, PNG) is True
        assert await uploads.put(url, PNG) is False
    assert stored(bucket)["Body"].read() == PNG


async def test_a_put_whose_reply_is_lost_is_not_sent_again_in_silence(stub: S3Stub, uploads: UploadUrls) -> None:
    """What the second one is answered (412, since the first has landed) would be taken for the answer."""
    await uploads.put(put_url(stub, "first.png"), PNG)
    path = f"/{BUCKET}/{KEY}"
    stub.answer(path, reset(), status(412))
    with pytest.raises(UploadInterrupted):
        await uploads.put(put_url(stub), PNG)
    assert [seen.body for seen in stub.seen if seen.path == path] == [PNG]


@pytest.mark.parametrize(
    ("code", "failure", "retry_after_s", "delay_s"),
    [
        (401, UploadRefused, 0, None),
        (403, UploadRefused, 0, None),
        (307, UploadRefused, None, None),
        (400, UploadInterrupted, 60, 9),
        (404, UploadInterrupted, 60, 9),
        (409, UploadInterrupted, 60, 9),
        (429, UploadInterrupted, 60, 9),
        (503, UploadInterrupted, 60, 9),
    ],
)
async def test_what_a_put_is_answered_decides_who_moves(
    stub: S3Stub,
    uploads: UploadUrls,
    code: int,
    failure: type[UploadRefused | UploadInterrupted],
    retry_after_s: int | None,
    delay_s: float | None,
) -> None:
    stub.answer(f"/{BUCKET}/{KEY}", status(code, Retry_After="9", Location=stub.url))
    with pytest.raises(failure) as caught:
        await uploads.put(put_url(stub), PNG)
    assert caught.value.retry_after_s == retry_after_s
    assert getattr(caught.value, "delay_s", None) == delay_s
    assert caught.value.details == {"status": code, "url": f"{stub.url}/{BUCKET}/{KEY}"}
    assert len(stub.seen) == 1


async def test_an_expired_or_wrongly_signed_put_asks_for_a_fresh_url(stub: S3Stub, uploads: UploadUrls) -> None:
    path = f"/{BUCKET}/{KEY}"
    old = stub.presign("PUT", path, at=datetime.now(UTC) - timedelta(hours=1))
    for url in (old, stub.presign("GET", path), put_url(stub)[:-4] + "0000"):
        with pytest.raises(UploadRefused) as caught:
            await uploads.put(url, PNG)
        assert caught.value.retry_after_s == 0
    assert stub.objects == {}


@pytest.mark.parametrize("reply", [reset(), silence()], ids=["reset", "silence"])
async def test_a_put_that_breaks_is_tried_again(stub: S3Stub, uploads: UploadUrls, reply: Reply) -> None:
    stub.answer(f"/{BUCKET}/{KEY}", reply)
    with pytest.raises(UploadInterrupted) as caught:
        await uploads.put(put_url(stub), PNG)
    assert "X-Amz" not in "".join(traceback.format_exception(caught.value)) + str(caught.value.details)


async def test_a_put_to_a_forbidden_place_is_refused_for_good(stub: S3Stub, uploads: UploadUrls) -> None:
    for url in (put_url(stub).replace(BUCKET, "other"), "https://evil.example/pictures/a?X-Amz-Signature=s"):
        for attempt in (uploads.put(url, PNG), _check(uploads, url)):
            with pytest.raises(UploadRefused, match="not allowed") as caught:
                await attempt
            assert caught.value.retry_after_s is None
    assert stub.seen == []


async def _check(uploads: UploadUrls, url: str) -> None:
    uploads.check(url, NOW)


async def test_a_url_is_good_from_its_date_to_its_expiry(stub: S3Stub, uploads: UploadUrls) -> None:
    url = stub.presign("PUT", f"/{BUCKET}/{KEY}", expires_s=300, at=NOW)
    for seconds in (-899, 0, 299):
        uploads.check(url, NOW + timedelta(seconds=seconds))
    for seconds in (-901, 300, 301, 86_400):
        with pytest.raises(UploadRefused) as caught:
            uploads.check(url, NOW + timedelta(seconds=seconds))
        assert caught.value.retry_after_s == 0


@pytest.mark.parametrize(
    "query", ["", "?X-Amz-Date=20260501T120000Z&X-Amz-Expires=604801&X-Amz-Signature=s", "?Signature=s"]
)
async def test_a_url_that_no_store_would_take_is_refused_for_good(
    stub: S3Stub, uploads: UploadUrls, query: str
) -> None:
    with pytest.raises(UploadRefused) as caught:
        uploads.check(f"{stub.url}/{BUCKET}/{KEY}{query}", NOW)
    assert caught.value.retry_after_s is None


async def test_a_sigv2_url_is_good_until_it_expires_and_for_a_week_at_most(stub: S3Stub, uploads: UploadUrls) -> None:
    ends = int(NOW.timestamp()) + 604_800
    url = f"{stub.url}/{BUCKET}/{KEY}?AWSAccessKeyId=k&Signature=s&Expires="
    uploads.check(f"{url}{ends}", NOW)
    for expires, retry_after_s in ((ends + 1, None), (int(NOW.timestamp()), 0)):
        with pytest.raises(UploadRefused) as caught:
            uploads.check(f"{url}{expires}", NOW)
        assert caught.value.retry_after_s == retry_after_s
