"""`POST /generate-image` over a real socket: the answer, the errors, and code that was written for the old contract."""

import asyncio
import base64
import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
from pydantic import SecretStr
from redis.asyncio import Redis

from demo.servers import RedisServer, S3Server
from producer.gateway import create_app
from producer.settings import ProducerSettings
from schemas.errors import ErrorCode
from schemas.events import ModelInfo
from schemas.keys import JobState, Keys, Priority
from tests.integration.client_kit import begun
from tests.integration.gateway_kit import PNG, PROMPT, TOKEN, Painter, calling, gateway_settings, serving
from tests.integration.queue_kit import entries, job

WHOLE = {
    "prompt": "a portrait of ann",
    "negative_prompt": "blurry",
    "lora_url": "https://files.example/ann.safetensors?X-Amz-Signature=s3cr3t",
    "lora_scale": 0.5,
    "lora_version": "v3",
    "width": 768,
    "height": 1344,
    "steps": 20,
    "cfg": 7.5,
    "seed": 7,
    "timeout": 90,
}


async def test_a_picture_is_the_answer(http: httpx.AsyncClient, painter: Painter) -> None:
    call = begun(http.post("/generate-image", json=WHOLE))
    lease, delivery = await painter.run_one()
    model = ModelInfo(base_model="base", lora_applied=True, lora_version="v3", lora_scale=0.5)
    event = await painter.paint(lease, delivery, model_info=model, image_size=(768, 1344))
    answer = await call
    assert answer.status_code == 200
    found = answer.json()
    assert base64.b64decode(found.pop("image_base64")) == PNG
    assert found == {
        "image_size": [768, 1344],
        "generation_time_seconds": 1.5,
        "model_info": {"base_model": "base", "lora_applied": True, "lora_version": "v3", "lora_scale": 0.5},
        "metadata": {"seed_used": 2**32 - 1, "actual_steps": 28, "actual_cfg": 5.5},
        "image_url": event.data.image_url,
        "job_id": lease.job_id,
    }


async def test_the_request_on_the_wire_has_every_field_and_expires_with_the_call(
    http: httpx.AsyncClient, painter: Painter
) -> None:
    before = datetime.now(UTC)
    call = begun(http.post("/generate-image", json=WHOLE))
    request = await painter.paint_next()
    await call
    assert WHOLE.items() <= request.model_dump().items()
    assert request.expires_at is not None
    assert before + timedelta(seconds=90) <= request.expires_at <= datetime.now(UTC) + timedelta(seconds=90)


async def test_what_is_not_said_has_its_default_and_a_call_lasts_140_seconds_at_most(
    http: httpx.AsyncClient, painter: Painter
) -> None:
    for body, timeout in ((PROMPT, 60), ({**PROMPT, "timeout": 300}, 140)):
        call = begun(http.post("/generate-image", json=body))
        request = await painter.paint_next()
        await call
        assert (request.width, request.height, request.steps, request.cfg) == (1024, 1024, 28, 5.5)
        assert request.timeout == timeout
        assert request.expires_at is not None
        assert request.expires_at <= datetime.now(UTC) + timedelta(seconds=timeout)


async def test_whoever_holds_the_line_goes_before_others(
    http: httpx.AsyncClient, painter: Painter, redis: Redis, keys: Keys
) -> None:
    call = begun(http.post("/generate-image", json=PROMPT))
    lease, delivery = await painter.run_one()
    assert len(await entries(redis, keys.requests(Priority.HIGH))) == 1
    await painter.paint(lease, delivery)
    await call


def old_client(url: str) -> dict[str, Any]:
    """How a backend calls a synchronous endpoint today; nothing of this project in it."""
    response = httpx.post(
        f"{url}/generate-image",
        json={"prompt": "a red fox", "lora_url": None, "lora_scale": 0.8, "seed": None, "timeout": 60},
        headers={"Authorization": f"Bearer {TOKEN}"},
        timeout=150,
    )
    response.raise_for_status()
    body: dict[str, Any] = response.json()
    return {"png": base64.b64decode(body["image_base64"]), "seed": body["metadata"]["seed_used"]}


async def test_code_for_the_synchronous_contract_runs_unchanged(
    gateway_env: ProducerSettings, painter: Painter
) -> None:
    async with serving(create_app(gateway_env)) as url:
        call = begun(asyncio.to_thread(old_client, url))
        await painter.paint_next()
        assert (await call)["png"] == PNG


ENDS = [
    (ErrorCode.INVALID_REQUEST, None, 400),
    (ErrorCode.INVALID_PROMPT, None, 400),
    (ErrorCode.LORA_DOWNLOAD_FAILED, None, 400),
    (ErrorCode.LORA_DOWNLOAD_FAILED, 0, 400),
    (ErrorCode.LORA_DOWNLOAD_FAILED, 60, 502),
    (ErrorCode.LORA_LOAD_FAILED, None, 400),
    (ErrorCode.MODEL_LOAD_FAILED, 60, 503),
    (ErrorCode.GENERATION_FAILED, 30, 500),
    (ErrorCode.CUDA_OOM, 30, 503),
    (ErrorCode.TIMEOUT, 0, 504),
    (ErrorCode.UPLOAD_FAILED, 60, 502),
    (ErrorCode.EXPIRED, 0, 504),
    (ErrorCode.WORKER_LOST, 60, 503),
    (ErrorCode.INTERNAL, 60, 500),
]


async def test_each_end_of_a_job_has_its_status(http: httpx.AsyncClient, painter: Painter) -> None:
    for code, retry_after, status in ENDS:
        call = begun(http.post("/generate-image", json=PROMPT))
        await painter.fail_one(code, retry_after)
        answer = await call
        found = answer.json()
        assert (answer.status_code, found["error_code"], found["retry_after"]) == (status, code, retry_after)
        assert found["error"] == f"no: {code}"
        assert set(found) == {"error", "error_code", "details", "retry_after", "job_id"}
        told = None if retry_after is None or status < 500 else str(retry_after)
        assert answer.headers.get("Retry-After") == told
    assert {code for code, _, _ in ENDS} | {ErrorCode.CANCELLED} == set(ErrorCode)


async def test_a_job_that_somebody_cancels_is_409(
    http: httpx.AsyncClient, painter: Painter, redis: Redis, keys: Keys
) -> None:
    call = begun(http.post("/generate-image", json=PROMPT))
    lease, delivery = await painter.run_one()
    said = (await http.delete(f"/v1/jobs/{lease.job_id}")).json()
    assert (said["verdict"], said["state"]) == ("asked", "running")
    await painter.cancel(lease, delivery)
    answer = await call
    assert (answer.status_code, answer.json()["error_code"]) == (409, "CANCELLED")


async def test_a_full_queue_is_429_and_says_when_to_come_back(
    redis_at: RedisServer, s3_at: S3Server, keys: Keys
) -> None:
    settings = gateway_settings(redis_at, keys, s3_at, max_queue=1)
    async with calling(create_app(settings)) as http:
        assert (await http.post("/v1/jobs", json=PROMPT)).status_code == 202
        answer = await http.post("/generate-image", json=PROMPT)
    assert answer.status_code == 429
    assert answer.json()["error_code"] == "QUEUE_FULL"
    assert answer.headers["Retry-After"] == str(answer.json()["retry_after"])


async def test_redis_out_of_reach_is_503_and_names_no_secret(
    redis_at: RedisServer, s3_at: S3Server, keys: Keys
) -> None:
    away = SecretStr("redis://:pa55word@127.0.0.1:1/0")
    settings = gateway_settings(redis_at, keys, s3_at).model_copy(update={"redis_url": away})
    async with calling(create_app(settings)) as http:
        answers = [await http.post("/generate-image", json=PROMPT), await http.get("/v1/jobs/a")]
    for answer in answers:
        assert (answer.status_code, answer.json()["error_code"]) == (503, "UNAVAILABLE")
        assert answer.headers["Retry-After"] == "5"
        assert "pa55word" not in answer.text


async def test_without_storage_settings_no_job_is_made(redis_at: RedisServer, redis: Redis, keys: Keys) -> None:
    async with calling(create_app(gateway_settings(redis_at, keys, None))) as http:
        answer = await http.post("/generate-image", json=PROMPT)
    assert (answer.status_code, answer.json()["error_code"]) == (503, "UNAVAILABLE")
    assert await entries(redis, keys.requests(Priority.HIGH)) == []


async def test_a_picture_that_cannot_be_read_is_502_and_can_be_asked_for_again(
    http: httpx.AsyncClient, painter: Painter, s3_at: S3Server
) -> None:
    client = s3_at.client()
    key = {"Idempotency-Key": "lost-1"}
    call = begun(http.post("/generate-image", json=PROMPT, headers=key))
    lease, delivery = await painter.run_one()
    await painter.paint(lease, delivery, image_sha256=hashlib.sha256(b"another").hexdigest())
    assert (await call).json()["error_code"] == "IMAGE_UNAVAILABLE"
    await asyncio.to_thread(client.delete_object, Bucket="gateway", Key="images/lost-1.png")
    answer = await http.post("/generate-image", json=PROMPT, headers=key)
    client.close()
    assert (answer.status_code, answer.headers["Retry-After"]) == (502, "5")
    assert "HTTP 404" in answer.json()["error"]
    assert answer.json()["job_id"] == "lost-1"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt"),
    ({"prompt": 7}, "prompt"),
    ({**PROMPT, "steps": 19}, "steps"),
    ({**PROMPT, "steps": 28.0}, "steps"),
    ({**PROMPT, "cfg": "7"}, "cfg"),
    ({**PROMPT, "width": 640}, "width"),
    ({**PROMPT, "lora_scale": 1.1}, "lora_scale"),
    ({**PROMPT, "timeout": 301}, "timeout"),
    ({**PROMPT, "timeout": 0}, "timeout"),
    ({**PROMPT, "colour": "red"}, "colour"),
    ({**PROMPT, "job_id": "mine"}, "job_id"),
    ({**PROMPT, "loras": []}, "loras"),
    ({**PROMPT, "expires_at": "2030-01-01T00:00:00Z"}, "expires_at"),
]


async def test_a_body_that_does_not_fit_is_400_and_names_the_field(http: httpx.AsyncClient) -> None:
    for body, field in WRONG:
        answer = await http.post("/generate-image", json=body)
        found = answer.json()
        assert (answer.status_code, found["error_code"], found["retry_after"]) == (400, "INVALID_REQUEST", None)
        assert [problem["field"] for problem in found["details"]["problems"]] == [field]


async def test_what_is_no_strict_json_object_is_400(http: httpx.AsyncClient) -> None:
    for body in (b"", b"{", b"[]", b"null", b'"x"', b'{"prompt":"a","prompt":"b"}', b'{"prompt":NaN}', b'"\xff"'):
        answer = await http.post("/generate-image", content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["error_code"]) == (400, "INVALID_REQUEST")


async def test_a_blank_prompt_is_400_with_a_code_of_its_own(http: httpx.AsyncClient) -> None:
    answer = await http.post("/generate-image", json={"prompt": " \u200b"})
    assert (answer.status_code, answer.json()["error_code"]) == (400, "INVALID_PROMPT")


async def test_no_answer_and_no_hash_keeps_a_signature(
    http: httpx.AsyncClient, painter: Painter, redis: Redis, keys: Keys
) -> None:
    call = begun(http.post("/generate-image", json=WHOLE, headers={"Idempotency-Key": "signed-1"}))
    await painter.fail_one(ErrorCode.LORA_DOWNLOAD_FAILED, 0)
    assert "s3cr3t" not in (await call).text
    assert "s3cr3t" not in str(await job(redis, keys, "signed-1"))
    assert JobState((await job(redis, keys, "signed-1"))["state"]) is JobState.FAILED
