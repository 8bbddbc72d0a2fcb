"""The example backend's other provider: an endpoint that answers with the picture, spoken to over HTTP."""

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from sqlalchemy.orm import Session, sessionmaker

from demo.servers import RedisServer, S3Server
from examples.backend.content import Tier, order
from examples.backend.endpoint import open_endpoint
from examples.backend.relay import Relay
from examples.backend.settings import BackendSettings
from examples.backend.tables import Content, open_sessions
from producer.gateway import create_app
from producer.settings import ProducerSettings
from schemas.keys import Keys
from tests.integration.backend_kit import contents, fill, ordered, outbox, serving, settings_for, shown
from tests.integration.client_kit import begun
from tests.integration.gateway_kit import BUCKET, TOKEN, Painter
from tests.integration.gateway_kit import PNG as GATEWAY_PNG
from tests.integration.gateway_kit import serving as serving_gateway

PNG = b"\x89PNG a picture"
PICTURE = {
    "image_base64": base64.b64encode(PNG).decode(),
    "image_size": [1024, 1024],
    "image_url": "https://images.example/1.png",
    "generation_time_seconds": 1.5,
    "model_info": {"base_model": "base", "lora_applied": True, "lora_version": None, "lora_scale": 0.8},
    "metadata": {"seed_used": 2**32 - 1, "actual_steps": 28, "actual_cfg": 5.5},
    "job_id": "j",
}
Reply = tuple[int, Any, dict[str, str]]


class Endpoint:
    """Plays `replies` to each key in turn, the last one for ever."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = replies
        self.headers: list[dict[str, str]] = []
        self.bodies: list[dict[str, Any]] = []

    async def handle(self, request: web.Request) -> web.Response:
        key = request.headers["Idempotency-Key"]
        before = sum(headers["Idempotency-Key"] == key for headers in self.headers)
        self.headers.append(dict(request.headers))
        self.bodies.append(await request.json())
        status, body, headers = self.replies[min(before, len(self.replies) - 1)]
        return web.json_response(body, status=status, headers=headers)


@asynccontextmanager
async def listening(endpoint: Endpoint) -> AsyncIterator[str]:
    """The URL to put into MODAL_ENDPOINT_URL."""
    app = web.Application()
    app.router.add_post("/v0/generate-image", endpoint.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v0"
    finally:
        await runner.cleanup()


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {
        "LORA_PROVIDER": "http",
        "MODAL_API_TOKEN": "secret-token",
        "R2_ENDPOINT_URL": "https://r2.example",
        "R2_BUCKET_NAME": "pictures",
        "R2_ACCESS_KEY_ID": "id",
        "R2_SECRET_ACCESS_KEY": "secret",
        "database_url": f"sqlite:///{tmp_path}/backend.db",
    }


SettingsFor = Callable[[str], BackendSettings]


@pytest.fixture
def settings(redis_at: RedisServer, keys: Keys, environment: dict[str, str]) -> SettingsFor:
    return lambda url: settings_for(redis_at.url, keys, **environment, MODAL_ENDPOINT_URL=url)


@pytest.fixture
def sessions(environment: dict[str, str]) -> Iterator[sessionmaker[Session]]:
    opened = open_sessions(environment["database_url"])
    fill(opened)
    yield opened
    opened.kw["bind"].dispose()


async def relayed(settings: BackendSettings, sessions: sessionmaker[Session]) -> float:
    """What one walk over the outbox says."""
    async with open_endpoint(settings) as endpoint:
        relay = Relay(sessions, endpoint.generate_many, poll_s=0.05, committed=asyncio.Event())
        return await relay.publish_all()


def place(sessions: sessionmaker[Session], timeout_s: float = 300) -> Content:
    return order(sessions, "ann", "in the rain", Tier.STANDARD, timeout_s=timeout_s)


async def test_the_answer_of_the_endpoint_is_stored_as_the_content(
    settings: SettingsFor, sessions: sessionmaker[Session]
) -> None:
    endpoint = Endpoint((200, PICTURE, {}))
    async with listening(endpoint) as url, serving(settings(url)) as web:
        order = await ordered(web)
        view = await shown(web, order["content_id"])
    assert view["status"] == "succeeded"
    assert view["image_url"] == "https://images.example/1.png"
    assert view["image_sha256"] == hashlib.sha256(PNG).hexdigest()
    assert (view["seed"], view["timings"]) == (2**32 - 1, {"generate": 1.5})
    [headers], [body] = endpoint.headers, endpoint.bodies
    assert headers["Authorization"] == "Bearer secret-token"
    assert headers["Idempotency-Key"] == order["job_id"]
    lora_url = body.pop("lora_url")
    assert lora_url.startswith("https://r2.example/pictures/loras/ann.safetensors?")
    assert body == {
        "prompt": "ann woman, a portrait, in the rain",
        "width": 1024,
        "height": 1024,
        "steps": 28,
        "timeout": 300,
        "lora_scale": 0.8,
    }
    assert outbox(sessions) == []


@pytest.mark.parametrize(
    ("answered", "code", "retry_after", "status"),
    [
        (400, "INVALID_PROMPT", None, "failed"),
        (504, "TIMEOUT", 0, "failed"),
        (502, "OF_ANOTHER_TIME", 60, "failed"),
        (409, "CANCELLED", None, "cancelled"),
    ],
)
async def test_an_error_of_the_endpoint_ends_the_content(
    settings: SettingsFor,
    sessions: sessionmaker[Session],
    answered: int,
    code: str,
    retry_after: int | None,
    status: str,
) -> None:
    place(sessions)
    problem: dict[str, Any] = {"error": "no", "error_code": code, "details": {}, "retry_after": retry_after}
    async with listening(Endpoint((answered, problem, {}))) as url:
        assert await relayed(settings(url), sessions) == 0
    [row] = contents(sessions)
    assert (row.status, row.error_code, row.error, row.retry_after) == (status, code, "no", retry_after)
    assert outbox(sessions) == []


@pytest.mark.parametrize(
    ("reply", "pause_s"),
    [
        ((429, {"error": "full"}, {"Retry-After": "7"}), 7),
        ((503, {"error": "no"}, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}), 10),
        ((401, {"error": "token"}, {}), 10),
        ((200, ["not a picture"], {}), 10),
        ((502, ["of a proxy"], {}), 10),
    ],
)
async def test_an_order_that_is_not_taken_for_now_is_asked_for_again_under_the_same_key(
    settings: SettingsFor, sessions: sessionmaker[Session], reply: Reply, pause_s: int
) -> None:
    placed = place(sessions)
    endpoint = Endpoint(reply, (200, PICTURE, {}))
    async with listening(endpoint) as url:
        assert await relayed(settings(url), sessions) == pause_s
        assert [row.status for row in contents(sessions)] == ["pending"]
        assert await relayed(settings(url), sessions) == 0
    assert [row.status for row in contents(sessions)] == ["succeeded"]
    assert [headers["Idempotency-Key"] for headers in endpoint.headers] == [placed.job_id] * 2


async def test_an_endpoint_that_is_gone_is_waited_for_until_nobody_waits(
    settings: SettingsFor, sessions: sessionmaker[Session]
) -> None:
    async with listening(Endpoint()) as url:
        pass
    place(sessions)
    assert await relayed(settings(url), sessions) == 10
    place(sessions, timeout_s=-1)
    await relayed(settings(url), sessions)
    assert sorted((row.status, row.error_code) for row in contents(sessions)) == [
        ("failed", "EXPIRED"),
        ("pending", None),
    ]


async def test_orders_are_asked_for_several_at_a_time(settings: SettingsFor, sessions: sessionmaker[Session]) -> None:
    for _ in range(30):
        place(sessions)
    endpoint = Endpoint((200, PICTURE, {}))
    async with listening(endpoint) as url:
        await relayed(settings(url), sessions)
    assert {row.status for row in contents(sessions)} == {"succeeded"}
    assert len(endpoint.headers) == 30


async def test_the_queues_own_gateway_is_such_an_endpoint(
    environment: dict[str, str],
    redis_at: RedisServer,
    s3_at: S3Server,
    keys: Keys,
    sessions: sessionmaker[Session],
    gateway_env: ProducerSettings,
    painter: Painter,
) -> None:
    placed = place(sessions)
    environment |= {"MODAL_API_TOKEN": TOKEN, "R2_ENDPOINT_URL": s3_at.url, "R2_BUCKET_NAME": BUCKET}
    async with serving_gateway(create_app(gateway_env)) as url:
        settings = settings_for(redis_at.url, keys, **environment, MODAL_ENDPOINT_URL=url)
        walk = begun(relayed(settings, sessions))
        request = await painter.paint_next()
        assert await walk == 0
    [row] = contents(sessions)
    assert (row.status, row.image_sha256) == ("succeeded", hashlib.sha256(GATEWAY_PNG).hexdigest())
    assert (request.job_id, row.image_key) == (placed.job_id, f"images/{placed.job_id}.png")
    assert request.lora_url is not None
    assert request.image_key == row.image_key
