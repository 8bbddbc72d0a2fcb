"""The synchronous contract with everything real behind it: uvicorn, Redis, an S3, and `python -m consumer`."""

import asyncio
import base64
import hashlib
import io
from pathlib import Path

import httpx
import pytest
from PIL import Image

from demo.servers import RedisServer, S3Server
from producer.gateway import create_app
from schemas.keys import Keys
from tests.integration.gateway_kit import calling, gateway_settings
from tests.integration.wire_kit import BUCKET, SMALL, consuming

pytestmark = pytest.mark.usefixtures("one_thread")


async def ask(http: httpx.AsyncClient, seed: int) -> dict[str, object]:
    answer = await http.post("/generate-image", json={**SMALL, "seed": seed, "timeout": 120}, timeout=150)
    assert answer.status_code == 200, answer.text
    found: dict[str, object] = answer.json()
    return found


async def test_a_picture_that_a_consumer_draws_is_the_answer(
    redis_at: RedisServer, s3_at: S3Server, tiny_model: Path, tmp_path: Path, keys: Keys
) -> None:
    s3_at.create_bucket(BUCKET)
    settings = gateway_settings(redis_at, keys, s3_at, r2_bucket=BUCKET)
    with consuming(redis_at, s3_at, tiny_model, tmp_path, keys, SDXL_SPEED="fast") as wire:
        async with calling(create_app(settings)) as http:
            found, other = await asyncio.gather(ask(http, 7), ask(http, 8))
            png = base64.b64decode(str(found["image_base64"]))
            event = (await http.get(f"/v1/jobs/{found['job_id']}")).json()["event"]
        assert wire.process.poll() is None
    assert hashlib.sha256(png).hexdigest() == event["data"]["image_sha256"]
    assert Image.open(io.BytesIO(png)).size == (512, 512)
    assert found["image_size"] == [512, 512]
    assert found["metadata"] == {"seed_used": 7, "actual_steps": 20, "actual_cfg": 5.5}
    assert found["image_url"] == f"https://pictures.example.com/images/{found['job_id']}.png"
    assert other["image_base64"] != found["image_base64"]
