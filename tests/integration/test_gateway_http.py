"""The gateway as an HTTP server: tokens, sizes, types, routes, and what a defect looks like from outside."""

import asyncio
import contextlib
import json
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from producer.gateway import create_app
from producer.settings import ProducerSettings
from schemas.keys import Keys, Priority
from tests.integration.gateway_kit import PROMPT, TOKEN, serving
from tests.integration.queue_kit import entries

GUARDED = [
    ("POST", "/generate-image"),
    ("POST", "/v1/jobs"),
    ("GET", "/v1/jobs/a"),
    ("GET", "/v1/jobs/a/events"),
    ("DELETE", "/v1/jobs/a"),
]
SHAPE = {"error", "error_code", "details", "retry_after"}


async def test_every_route_but_health_needs_the_token(http: httpx.AsyncClient, redis: Redis, keys: Keys) -> None:
    wrong: list[str | bytes] = ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", b"Bearer \xe4\xff"]
    for method, path in GUARDED:
        for credentials in wrong:
            headers: Any = {"Authorization": credentials}
            answer = await http.request(method, path, json=PROMPT, headers=headers)
            assert (answer.status_code, answer.json()["error_code"]) == (401, "UNAUTHORIZED")
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert set(answer.json()) == SHAPE
    assert await entries(redis, keys.requests(Priority.NORMAL)) == []
    accepted = await http.post("/v1/jobs", json=PROMPT, headers={"Authorization": f"bearer {TOKEN}"})
    assert accepted.status_code == 202


async def test_what_is_not_there_has_the_same_shape(http: httpx.AsyncClient) -> None:
    wrong = [("GET", "/", 404), ("GET", "/v1/jobs/", 404), ("GET", "/generate-image", 405), ("PUT", "/v1/jobs/a", 405)]
    for method, path, status in wrong:
        answer = await http.request(method, path)
        assert (answer.status_code, set(answer.json())) == (status, SHAPE)
        assert ("Allow" in answer.headers) == (status == 405)


async def test_a_body_over_64_kib_is_413_however_it_is_sent(http: httpx.AsyncClient) -> None:
    body = json.dumps({**PROMPT, "negative_prompt": "x" * 70_000}).encode()

    async def in_pieces() -> Any:
        for _ in range(20):
            yield b" " * 4096

    for content in (body, in_pieces()):
        answer = await http.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["error_code"]) == (413, "PAYLOAD_TOO_LARGE")


async def test_an_endless_body_is_answered_before_its_end(gateway_env: ProducerSettings) -> None:
    async with serving(create_app(gateway_env)) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        head = (
            f"POST /v1/jobs HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
        )
        writer.write(head.encode() + b"Content-Length: 1000000000\r\n\r\n" + b" " * 100_000)
        async with asyncio.timeout(10):
            assert (await reader.readline()).startswith(b"HTTP/1.1 413")
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_a_body_that_never_comes_is_408(gateway_env: ProducerSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("producer.gateway.bodies._BODY_S", 0.05)
    async with serving(create_app(gateway_env)) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        head = f"POST /v1/jobs HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 10\r\n\r\n"
        writer.write(head.encode())
        async with asyncio.timeout(10):
            assert (await reader.readline()).startswith(b"HTTP/1.1 408")
        writer.close()
        await writer.wait_closed()


async def test_a_caller_who_leaves_within_the_body_leaves_no_traceback(
    gateway_env: ProducerSettings, caplog: pytest.LogCaptureFixture, redis: Redis, keys: Keys
) -> None:
    async with serving(create_app(gateway_env)) as url:
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        head = f"POST /v1/jobs HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 10\r\n\r\n"
        writer.write(head.encode() + b"{")
        await writer.drain()
        writer.close()
        await writer.wait_closed()
    assert "Traceback" not in caplog.text
    assert await entries(redis, keys.requests(Priority.NORMAL)) == []


async def test_only_json_is_taken(http: httpx.AsyncClient) -> None:
    body = json.dumps(PROMPT).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        answer = await http.post("/v1/jobs", content=body, headers={"Content-Type": kind})
        assert (answer.status_code, answer.json()["error_code"]) == (415, "UNSUPPORTED_MEDIA_TYPE")
    for kind in ("application/json", "Application/JSON; charset=utf-8"):
        assert (await http.post("/v1/jobs", content=body, headers={"Content-Type": kind})).status_code == 202
    assert (await http.post("/v1/jobs", content=body)).status_code == 202  # nothing said


async def test_a_defect_is_500_in_the_same_shape_and_tells_nothing(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("s3cr3t")

    monkeypatch.setattr("producer.async_client.AsyncGenerationClient.status", broken)
    answer = await http.get("/v1/jobs/a")
    assert (answer.status_code, answer.json()["error_code"], set(answer.json())) == (500, "INTERNAL", SHAPE)
    assert "s3cr3t" not in answer.text


async def test_whoever_is_to_be_woken_is_woken_by_a_submission(gateway_env: ProducerSettings) -> None:
    woken = asyncio.Event()

    async def wake() -> None:
        woken.set()

    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with serving(create_app(gateway_env, wake=wake)) as url, httpx.AsyncClient(headers=headers) as http:
        await http.post(f"{url}/v1/jobs", json=PROMPT)
    assert woken.is_set()
