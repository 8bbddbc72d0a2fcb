"""Faults 30 to 40: storage, LoRAs that come from it, and pictures that go there."""

import gzip
import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiohttp import web

from tests.chaos.surroundings import FETCH_S
from tests.chaos.world import BUCKET, LORA, World
from tests.s3_stub import Reply, content, endless, hang_up, slow, status, truncated

FILE = b"lora" + bytes(60_000)
PICTURE = f"/{BUCKET}/images/a.png"

server_errors = pytest.mark.fault(33, "5xx burst")
slow_store = pytest.mark.fault(35, "1 byte/s")
lost_reply = pytest.mark.fault(38, "PUT done, reply lost, retry sees 412")
mismatch = pytest.mark.fault(40, "size or hash mismatch")


def outcome(world: World, **environment: Any) -> dict[str, Any]:
    """What a consumer makes of the job `a`: the data of its terminal event."""
    world.injected()
    world.consumer(**environment)
    data: dict[str, Any] = world.until_ended()["a"]["data"]
    world.recovered()
    return data


def failure(data: dict[str, Any]) -> tuple[str, int | None, bool, int]:
    return data["error_code"], data["retry_after"], data["dead_lettered"], data["attempt"]


def retries(world: World) -> list[str]:
    """The error codes of the attempts that were tried again."""
    return [event["data"]["error_code"] for event in world.events() if event["type"] == "generation.retrying"]


def requests_for(world: World, path: str, method: str = "GET") -> int:
    return sum((seen.path, seen.method) == (path, method) for seen in world.store.seen)


@pytest.mark.fault(30, "403 expired")
def test_an_expired_lora_url_asks_for_a_fresh_one_and_costs_no_drawing(world: World) -> None:
    """Guards 401 and 403 in `_failure` of consumer/lora/fetch.py."""
    world.publish(
        "a", lora_url=world.store.presign("GET", LORA, expires_s=60, at=datetime.now(UTC) - timedelta(minutes=4))
    )
    assert failure(outcome(world)) == ("LORA_DOWNLOAD_FAILED", 0, True, 1)
    assert requests_for(world, LORA) == 1
    assert not world.executions()


@pytest.mark.fault(31, "404")
def test_a_lora_that_is_not_there_fails_for_good(world: World) -> None:
    """Guards 4xx in `_failure` of consumer/lora/fetch.py."""
    world.publish("a", lora_url=world.store.presign("GET", f"/{BUCKET}/loras/gone"))
    assert failure(outcome(world)) == ("LORA_DOWNLOAD_FAILED", None, False, 1)
    assert not world.executions()


@pytest.mark.fault(32, "429 with Retry-After")
def test_a_busy_store_is_asked_again_when_it_says(world: World) -> None:
    """Guards `asked_s` in `RetryPolicy.delay_s`, and Retry-After in `_failure`: the delay is 0.1 s at most else."""
    world.store.answer(LORA, status(429, Retry_After="1"), content(FILE))
    world.publish("a")
    data = outcome(world, SDXL_RETRY_CAP_SECONDS="5")
    assert data["attempt"] == 2
    retrying = next(event for event in world.events() if event["type"] == "generation.retrying")
    assert retrying["data"]["retry_after"] >= 1


@server_errors
def test_a_store_that_recovers_gives_the_lora_in_the_end(world: World) -> None:
    """Guards the last case of `_failure` in consumer/lora/fetch.py, which is tried again."""
    world.store.answer(LORA, status(503), status(500), content(FILE))
    world.publish("a")
    assert outcome(world)["attempt"] == 3
    assert retries(world) == ["LORA_DOWNLOAD_FAILED"] * 2


@server_errors
def test_a_store_that_recovers_takes_the_picture_in_the_end(world: World) -> None:
    """Guards `UploadInterrupted` in `ArtifactStore._interrupted`. boto3 itself asks twice each time."""
    world.store.answer(PICTURE, *[status(503)] * 3, world.store.obey)
    world.publish("a")
    assert outcome(world)["attempt"] == 2
    assert retries(world) == ["UPLOAD_FAILED"]


@server_errors
def test_a_store_that_stays_broken_fails_the_job_for_its_backend(world: World) -> None:
    """Guards the bound in `RetryPolicy.may_retry`."""
    world.store.answer(LORA, status(503))
    world.publish("a")
    assert failure(outcome(world)) == ("LORA_DOWNLOAD_FAILED", 60, True, 3)
    assert requests_for(world, LORA) == 3


@pytest.mark.fault(34, "truncated body")
def test_a_lora_that_breaks_off_is_fetched_again_whole(world: World) -> None:
    """Guards ExchangeBroken in `LoraFetcher._fill`, and that nothing is published to the cache before its end."""
    world.store.answer(LORA, truncated(FILE, sent=30_000), content(FILE, ETag='"whole"'))
    world.publish("a")
    assert outcome(world)["attempt"] == 2
    assert retries(world) == ["LORA_DOWNLOAD_FAILED"]
    assert cached(world) == [hashlib.sha256(FILE).hexdigest()]


def cached(world: World) -> list[str]:
    """The digests of what is in the consumers' cache."""
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in (world.folder / "cache/objects").iterdir()]


@slow_store
def test_a_store_of_one_byte_a_second_ends_at_the_fetch_deadline(world: World) -> None:
    """Guards `total` in the ClientTimeout of `exchange`: each byte comes in time for the read's own deadline."""
    world.store.answer(LORA, slow(0.2), content(FILE))
    world.publish("a")
    assert outcome(world, **{FETCH_S: "1"})["attempt"] == 2
    assert retries(world) == ["LORA_DOWNLOAD_FAILED"]


@slow_store
def test_a_store_of_one_byte_a_second_ends_at_the_jobs_own_timeout(world: World) -> None:
    """Guards `left_s` in `Attempt.guard`."""
    world.store.answer(LORA, slow(0.2))
    world.publish("a", timeout=1)
    assert failure(outcome(world)) == ("TIMEOUT", 0, True, 1)


@pytest.mark.fault(36, "endless body")
def test_an_endless_lora_ends_at_the_limit(world: World) -> None:
    """Guards `_check_size` in `LoraFetcher._save`."""
    world.store.answer(LORA, endless())
    world.publish("a")
    assert failure(outcome(world, LORA_MAX_MB="1")) == ("LORA_DOWNLOAD_FAILED", None, False, 1)
    assert not list((world.folder / "cache/leases").iterdir())


@pytest.mark.fault(37, "gzip bomb")
def test_a_compressed_lora_is_not_inflated(world: World) -> None:
    """Guards `auto_decompress=False` in `open_session`: inflated, it would be a LoRA, and as large as it likes."""
    bomb = gzip.compress(b"lora" + bytes(10_000_000))
    world.store.answer(LORA, content(bomb, Content_Encoding="gzip", ETag='"bomb"'))
    world.publish("a")
    assert failure(outcome(world, LORA_MAX_MB="20")) == ("LORA_LOAD_FAILED", None, False, 1)
    assert cached(world) == [hashlib.sha256(bomb).hexdigest()]


def carried_out_in_silence(world: World) -> Reply:
    """Stores what is put, and hangs up instead of saying so."""

    async def reply(request: web.Request) -> web.StreamResponse:
        response = await world.store.obey(request)
        hang_up(request)
        return response

    return reply


@lost_reply
def test_a_picture_that_is_there_though_nobody_said_so_is_adopted(world: World) -> None:
    """Guards the 412 in `ArtifactStore._upload`."""
    world.store.answer(PICTURE, carried_out_in_silence(world), world.store.obey)
    world.publish("a")
    data = outcome(world)
    assert (data["attempt"], data["image_key"]) == (1, "images/a.png")
    assert requests_for(world, PICTURE, "PUT") == 2
    assert requests_for(world, PICTURE, "HEAD") == 1


@lost_reply
def test_a_picture_at_a_signed_url_is_known_by_its_noted_etag(world: World) -> None:
    """Guards `_put_once_more`, and the own ETag in `Artifacts._put`."""
    world.store.answer(PICTURE, carried_out_in_silence(world), world.store.obey)
    world.publish("a", upload_url=world.store.presign("PUT", PICTURE))
    data = outcome(world)
    assert data["attempt"] == 1
    assert data["image_sha256"] == hashlib.sha256(world.store.objects[PICTURE].body).hexdigest()


@pytest.mark.fault(39, "store refuses checksum headers")
@pytest.mark.parametrize("signed", [False, True], ids=["own bucket", "upload URL"])
def test_a_store_that_knows_no_checksum_headers_takes_the_picture(world: World, signed: bool) -> None:
    """Guards `request_checksum_calculation` in consumer/bucket.py; to a signed URL nothing unsigned may be sent."""

    async def reply(request: web.Request) -> web.StreamResponse:
        newer = [name for name in request.headers if name.lower().startswith(("x-amz-checksum-", "x-amz-sdk-checksum"))]
        return web.Response(status=501) if newer else await world.store.obey(request)

    world.store.answer(PICTURE, reply)
    world.publish("a", upload_url=world.store.presign("PUT", PICTURE) if signed else None)
    assert outcome(world)["attempt"] == 1


@mismatch
def test_a_lora_of_another_digest_is_refused_and_never_cached(world: World) -> None:
    """Guards `_check_sha256` in `LoraFetcher._get`, before it publishes."""
    world.publish("a", lora_sha256=hashlib.sha256(b"another").hexdigest())
    assert failure(outcome(world)) == ("LORA_DOWNLOAD_FAILED", None, False, 1)
    assert not cached(world)
    assert not world.executions()


@mismatch
def test_a_cached_lora_of_another_digest_is_refused_too_and_the_right_one_is_taken(world: World) -> None:
    """Guards `_check_sha256` at a 304 in `LoraFetcher._get`."""
    world.publish("first", lora_sha256=hashlib.sha256(FILE).hexdigest())
    world.consumer()
    assert world.until_ended()["first"]["type"] == "generation.succeeded"
    world.publish("a", lora_sha256=hashlib.sha256(b"another").hexdigest())
    assert failure(outcome(world)) == ("LORA_DOWNLOAD_FAILED", None, False, 1)


@mismatch
def test_a_lora_that_declares_more_than_is_allowed_is_refused_unread(world: World) -> None:
    """Guards the check of Content-Length in `LoraFetcher._save`."""
    world.store.answer(LORA, truncated(FILE, sent=1))
    world.publish("a")
    assert failure(outcome(world, LORA_MAX_MB="0.05")) == ("LORA_DOWNLOAD_FAILED", None, False, 1)
