"""LoRAs by key, presigned when asked: the URL reads the object, and the job stays the same job."""

import json
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from demo.servers import RedisServer, S3Server
from producer.client import AsyncGenerationClient
from producer.errors import JobConflict, RequestRefused
from producer.storage import PresignedUrls
from schemas.entries import decode_entry
from schemas.errors import ErrorCode
from schemas.keys import Keys, Priority
from schemas.requests import GenerationRequest
from tests.integration.cli_kit import Cli
from tests.integration.client_kit import STORAGE, Ender, a_client
from tests.integration.queue_kit import entries


async def requests_of(redis: Redis, keys: Keys) -> list[GenerationRequest]:
    found = [decode_entry(fields).request for _, fields in await entries(redis, keys.requests(Priority.NORMAL))]
    return [request for request in found if request is not None]


async def test_the_url_in_the_request_reads_the_object(
    redis_at: RedisServer, s3_at: S3Server, redis: Redis, keys: Keys
) -> None:
    bucket = keys.prefix
    s3_at.create_bucket(bucket)
    s3 = s3_at.client()
    s3.put_object(Bucket=bucket, Key="loras/cat ä.safetensors", Body=b"weights")
    s3.close()
    storage = PresignedUrls(
        endpoint_url=s3_at.url, bucket=bucket, access_key_id=s3_at.access_key, secret_access_key=s3_at.secret_key
    )
    async with a_client(redis_at.url, keys, storage=storage) as client, httpx.AsyncClient() as http:
        await client.submit(prompt="a fox", lora_key="loras/cat ä.safetensors", lora_scale=0.5, presign=True)
        [request] = await requests_of(redis, keys)
        assert (request.lora_key, request.lora_scale) == (None, 0.5)
        assert request.lora_url is not None
        assert (await http.get(request.lora_url)).content == b"weights"


async def test_the_same_call_is_the_same_job_and_the_call_without_signing_is_not(
    redis_at: RedisServer, redis: Redis, keys: Keys
) -> None:
    fields: Any = {"job_id": "job-1", "prompt": "a fox", "lora_key": "a.safetensors"}
    async with a_client(redis_at.url, keys, storage=STORAGE) as client:
        assert not (await client.submit(**fields, presign=True)).duplicate
        assert (await client.submit(**fields, presign=True)).duplicate
        with pytest.raises(JobConflict):
            await client.submit(**fields)
    assert len(await requests_of(redis, keys)) == 1


async def test_of_many_each_key_is_signed_and_the_rest_is_left_as_it_is(
    redis_at: RedisServer, redis: Redis, keys: Keys
) -> None:
    fields: list[Any] = [
        {"job_id": "one", "prompt": "a fox", "lora_key": "a.safetensors", "lora_version": "v2"},
        {"job_id": "two", "prompt": "a fox", "loras": [{"key": "a", "scale": 0.5}, {"url": "https://x.example/b?s=1"}]},
        {"job_id": "none", "prompt": "a fox"},
        {"prompt": ""},
    ]
    async with a_client(redis_at.url, keys, storage=STORAGE) as client:
        *_, refused = await client.submit_many(fields, presign=True)
    assert isinstance(refused, RequestRefused)
    one, two, none = await requests_of(redis, keys)
    assert (STORAGE.owns(one.lora_url or ""), one.lora_key, one.lora_version) == ("a.safetensors", None, "v2")
    assert [STORAGE.owns(lora.url or "") for lora in two.loras] == ["a", None]
    assert (two.loras[0].scale, two.loras[1].url) == (0.5, "https://x.example/b?s=1")
    assert none == GenerationRequest(job_id="none", prompt="a fox")


async def test_without_signing_the_consumer_reads_the_key_itself(
    redis_at: RedisServer, redis: Redis, keys: Keys
) -> None:
    async with a_client(redis_at.url, keys, storage=STORAGE) as client:
        await client.submit(prompt="a fox", lora_key="a.safetensors")
    [request] = await requests_of(redis, keys)
    assert (request.lora_key, request.lora_url) == ("a.safetensors", None)


async def test_a_client_without_storage_refuses_what_it_would_have_to_sign_and_nothing_else(
    client: AsyncGenerationClient, redis: Redis, keys: Keys
) -> None:
    with pytest.raises(RequestRefused, match="R2_") as caught:
        await client.submit(job_id="job-1", prompt="a fox", lora_key="a", presign=True)
    assert (caught.value.job_id, caught.value.error_code) == ("job-1", ErrorCode.INVALID_REQUEST)
    assert caught.value.details == {"field": "lora_key"}
    await client.submit(job_id="job-2", prompt="a fox", presign=True)
    assert [request.job_id for request in await requests_of(redis, keys)] == ["job-2"]


def test_the_command_line_signs_when_asked(cli: Cli) -> None:
    async def published(ann: Ender) -> list[GenerationRequest]:
        return await requests_of(ann.redis, ann.keys)

    storage = {
        "R2_ACCESS_KEY_ID": "id",
        "R2_SECRET_ACCESS_KEY": "canary",
        "R2_BUCKET_NAME": "pictures",
        "R2_ENDPOINT_URL": "https://account.r2.example",
    }
    cli.run("publish", "a fox", "--lora-key", "a.safetensors", "--presign", **storage)
    lines = json.dumps({"prompt": "a fox", "lora_key": "b.safetensors"})
    cli.run("publish", "--file", "-", "--presign", stdin=lines, **storage)
    cli.run("publish", "a fox", "--lora-key", "c.safetensors", **storage)
    first, second, third = cli.consume(published)
    assert [STORAGE.owns(request.lora_url or "") for request in (first, second)] == ["a.safetensors", "b.safetensors"]
    assert (third.lora_url, third.lora_key) == (None, "c.safetensors")


def test_the_command_line_says_what_it_lacks_to_sign(cli: Cli) -> None:
    cli.run("publish", "a fox", "--lora-key", "a.safetensors", "--presign")
    assert (cli.status, "R2_" in cli.err) == (2, True)
