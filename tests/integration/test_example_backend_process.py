"""The example backend as its README runs it, beside a real consumer: from HTTP request to a picture in the bucket."""

import asyncio
import hashlib
import signal
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from demo import loras
from demo.servers import RedisServer, S3Server
from examples.backend.__main__ import app
from examples.backend.tables import open_sessions
from producer.client import AsyncGenerationClient
from producer.errors import JobUnknown
from schemas.keys import JobState, Keys
from tests.integration.backend_kit import backend_process, fill, ordered, shown
from tests.integration.client_kit import PATIENCE_S, until
from tests.integration.wire_kit import BUCKET, consuming

pytestmark = pytest.mark.usefixtures("one_thread")


def environment_of(redis_at: RedisServer, s3_at: S3Server, keys: Keys, folder: Path) -> dict[str, str]:
    return {
        "REDIS_URL": redis_at.url,
        "SDXL_PREFIX": keys.prefix,
        "DATABASE_URL": f"sqlite:///{folder}/backend.db",
        "R2_ENDPOINT_URL": s3_at.url,
        "R2_BUCKET_NAME": BUCKET,
        "R2_ACCESS_KEY_ID": s3_at.access_key,
        "R2_SECRET_ACCESS_KEY": s3_at.secret_key,
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def answers(web: httpx.AsyncClient) -> bool:
    try:
        return (await web.get("/health")).status_code == 200
    except httpx.TransportError:
        return False


def seeded(environment: dict[str, str], *arguments: str) -> None:
    result = CliRunner().invoke(app, ["seed", *arguments], env=environment, catch_exceptions=False)
    assert result.exit_code == 0


async def test_a_picture_is_ordered_drawn_with_its_lora_stored_and_shown(
    redis_at: RedisServer, s3_at: S3Server, tiny_model: Path, keys: Keys, tmp_path: Path
) -> None:
    environment = environment_of(redis_at, s3_at, keys, tmp_path)
    with consuming(redis_at, s3_at, tiny_model, tmp_path, keys, R2_PUBLIC_URL="", SDXL_SPEED="fast") as wire:
        s3_at.create_bucket(BUCKET)
        modules = loras.attention_modules(loras.shapes_of(tiny_model))
        wire.upload(
            loras.write_peft(tmp_path / "ann.safetensors", modules, seed=3, strength=0.8), "loras/ann.safetensors"
        )
        for _ in range(2):  # whoever seeds twice has one avatar
            seeded(environment, "--lora-key", "loras/ann.safetensors")
        port = free_port()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as web:
            with backend_process(environment, tmp_path, "serve", "--port", str(port)) as process:
                await until(lambda: answers(web))
                order = await ordered(web, tier="free")
                view = await shown(web, order["content_id"])
                png = (await web.get(view["image_url"])).raise_for_status().content
                process.send_signal(signal.SIGTERM)
                status = await asyncio.to_thread(process.wait, PATIENCE_S)
        event: dict[str, Any] = wire.wait(order["job_id"])[order["job_id"]]
    log = (tmp_path / "backend.log").read_text()
    assert view["status"] == "succeeded", view
    assert event["data"]["image_url"] is None
    assert event["data"]["model_info"]["lora_applied"]
    assert hashlib.sha256(png).hexdigest() == view["image_sha256"] == event["data"]["image_sha256"]
    assert view["timings"] == event["data"]["timings"]
    assert status in (0, -signal.SIGTERM), log
    assert "X-Amz" not in log
    assert "Traceback" not in log


async def test_its_parts_run_as_processes_of_their_own(
    redis_at: RedisServer, s3_at: S3Server, keys: Keys, tmp_path: Path, client: AsyncGenerationClient
) -> None:
    environment = {**environment_of(redis_at, s3_at, keys, tmp_path), "MODAL_POLL_SECONDS": "0.05"}
    sessions = open_sessions(environment["DATABASE_URL"])
    fill(sessions)
    sessions.kw["bind"].dispose()
    port = free_port()
    serve = ["serve", "--no-loops", "--port", str(port)]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as web:
        with (
            backend_process(environment, tmp_path, *serve),
            backend_process(environment, tmp_path, "relay"),
            backend_process(environment, tmp_path, "listen") as listener,
        ):
            await until(lambda: answers(web))
            order = await ordered(web, "a bell \x07 rings")
            assert (await shown(web, order["content_id"]))["error_code"] == "INVALID_PROMPT"
            order = await ordered(web)
            await until(lambda: _has_left(client, order["job_id"]))
            await client.cancel(order["job_id"])
            assert (await shown(web, order["content_id"]))["status"] == "cancelled"
            listener.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(listener.wait, PATIENCE_S) == 0


async def _has_left(client: AsyncGenerationClient, job_id: str) -> bool:
    try:
        return (await client.status(job_id)).state == JobState.QUEUED
    except JobUnknown:
        return False
