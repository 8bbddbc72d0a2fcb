"""Presigned URLs against servers: one that checks signatures and expiry, and one that is an S3 in all the rest."""

from collections.abc import AsyncIterator
from urllib.parse import quote

import aiohttp
import pytest
from yarl import URL

from demo.servers import S3Server
from producer.storage import PresignedUrls
from tests.s3_stub import ACCESS_KEY, SECRET_KEY, S3Stub

KEY = "loras/ä cat+1.safetensors"


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


def signer(url: str, access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY) -> PresignedUrls:
    return PresignedUrls(endpoint_url=url, bucket="pictures", access_key_id=access_key, secret_access_key=secret_key)


async def fetch(http: aiohttp.ClientSession, method: str, url: str, data: bytes | None = None) -> tuple[int, bytes]:
    """Sends the URL as it is: quoting it again would break its signature."""
    async with http.request(method, URL(url, encoded=True), data=data) as response:
        return response.status, await response.read()


async def test_a_signed_url_reads_its_object_and_nothing_else(http: aiohttp.ClientSession, stub: S3Stub) -> None:
    stub.put(f"/pictures/{KEY}", b"weights")
    stub.put("/pictures/other", b"secret")
    url = signer(stub.url).lora_url(KEY)
    assert await fetch(http, "GET", url) == (200, b"weights")
    assert (await fetch(http, "GET", url.replace(quote(KEY), "other")))[0] == 403
    assert (await fetch(http, "HEAD", url))[0] == 403
    assert (await fetch(http, "PUT", url, b"x"))[0] == 403
    assert (await fetch(http, "GET", url.partition("?")[0]))[0] == 403


async def test_a_signed_upload_writes_its_object_and_reads_nothing(http: aiohttp.ClientSession, stub: S3Stub) -> None:
    url = signer(stub.url).upload_url("images/x.png")
    assert (await fetch(http, "PUT", url, b"png"))[0] == 200
    assert stub.objects["/pictures/images/x.png"].body == b"png"
    assert (await fetch(http, "GET", url))[0] == 403


async def test_a_longer_life_cannot_be_written_into_a_url(http: aiohttp.ClientSession, stub: S3Stub) -> None:
    stub.put("/pictures/a", b"weights")
    url = signer(stub.url).lora_url("a", expires_s=60)
    assert (await fetch(http, "GET", url.replace("X-Amz-Expires=60", "X-Amz-Expires=6000")))[0] == 403
    assert (await fetch(http, "GET", signer(stub.url, secret_key="wrong").lora_url("a")))[0] == 403


async def test_a_whole_round_through_an_s3(http: aiohttp.ClientSession, s3_at: S3Server) -> None:
    s3_at.create_bucket("pictures")
    urls = signer(s3_at.url, s3_at.access_key, s3_at.secret_key)
    assert (await fetch(http, "PUT", urls.upload_url(KEY), b"weights"))[0] == 200
    assert await fetch(http, "GET", urls.lora_url(KEY)) == (200, b"weights")
    assert urls.owns(urls.upload_url(KEY)) == KEY
