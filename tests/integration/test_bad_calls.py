"""Bad calls of the gateway: who has no token, is another site, or asks with GET, changes nothing."""

import secrets
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from demo.servers import RedisServer
from producer.gateway import access, create_app
from producer.settings import ProducerSettings
from schemas.errors import ErrorCode
from schemas.keys import Keys
from tests.integration.bad_commands_kit import everything
from tests.integration.client_kit import until
from tests.integration.gateway_kit import PROMPT, TOKEN, Painter, gateway_settings, serving, waiters_of

ELSEWHERE = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site", "Cookie": f"token={TOKEN}"}
OVERRIDES = {"X-HTTP-Method-Override": "DELETE", "X-Method-Override": "DELETE", "X-HTTP-Method": "DELETE"}
JOBS = ("waits", "runs", "is-over", "died", "nobody")
PATHS = ["/", "/health", "/openapi.json", "/generate-image", "/v1/jobs", *(f"/v1/jobs/{job_id}" for job_id in JOBS)]


@pytest.fixture
async def jobs(http: httpx.AsyncClient, painter: Painter) -> None:
    """A job in each state that a call could change."""
    for job_id in ("is-over", "died", "runs", "waits"):
        await http.post("/v1/jobs", json={**PROMPT, "job_id": job_id})
    await painter.paint_next()
    await painter.fail_one(ErrorCode.GENERATION_FAILED, 30)
    await painter.run_one()


@pytest.fixture
async def for_everybody(redis_at: RedisServer, keys: Keys) -> AsyncIterator[httpx.AsyncClient]:
    """A caller of a gateway that has no token, as on a developer's machine."""
    app = create_app(gateway_settings(redis_at, keys, None, api_token=None), for_everybody=True)
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=30) as http:
        yield http


async def nobody_follows(redis: Redis, keys: Keys, job_id: str) -> None:
    """Waits until the gateway has noticed that its follower left."""

    async def left() -> bool:
        return await waiters_of(redis, keys, job_id) == 0

    await until(left)


@pytest.mark.usefixtures("jobs")
async def test_no_get_changes_anything(http: httpx.AsyncClient, redis: Redis, keys: Keys) -> None:
    """Guards the methods of the routes: each that writes is POST or DELETE."""
    before = await everything(redis, keys)
    tries: list[dict[str, Any]] = [{}, {"headers": OVERRIDES}, {"params": {"_method": "DELETE", "method": "POST"}}]
    for path in PATHS:
        for method in ("GET", "HEAD", "OPTIONS", "TRACE"):
            for what in tries:
                answer = await http.request(method, path, **what)
                assert answer.status_code in (200, 404, 405), (method, path)
        await http.request("GET", path, json={**PROMPT, "job_id": "made"})
    for job_id in ("is-over", "died"):
        assert (await http.get(f"/v1/jobs/{job_id}/events")).status_code == 200
        await nobody_follows(redis, keys, job_id)
    assert await everything(redis, keys) == before


@pytest.mark.usefixtures("jobs")
async def test_whoever_only_watched_a_job_leaves_it_as_it_was(
    http: httpx.AsyncClient, redis: Redis, keys: Keys
) -> None:
    """Guards `not values[3]` in `waiters._LEAVE`: a job that no synchronous call has made is not cancelled."""
    before = await everything(redis, keys)
    for job_id in ("waits", "runs"):
        async with http.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
            assert answer.status_code == 200
        await nobody_follows(redis, keys, job_id)
    assert await everything(redis, keys) == before


SIMPLE: dict[str, dict[str, Any]] = {
    "as text": {"headers": {"Content-Type": "text/plain"}},
    "as a form": {"headers": {"Content-Type": "application/x-www-form-urlencoded"}},
    "as a form of parts": {"headers": {"Content-Type": "multipart/form-data; boundary=a"}},
    "as nothing that is said": {"headers": {}},
    "as JSON": {"headers": {"Content-Type": "application/json"}},
    "with a token in the URL": {"headers": {}, "params": {"token": TOKEN, "access_token": TOKEN}},
}


async def test_a_page_of_another_site_gets_nothing_done(
    gateway_env: ProducerSettings, redis: Redis, keys: Keys
) -> None:
    """Guards `Access`: what a browser sends by itself is no token; and that nothing allows another origin."""
    async with serving(create_app(gateway_env)) as url, httpx.AsyncClient(base_url=url) as http:
        for kind, what in SIMPLE.items():
            call = {**what, "headers": ELSEWHERE | what["headers"], "content": b'{"prompt":"a"}'}
            for method, path in (("POST", "/v1/jobs"), ("POST", "/generate-image"), ("DELETE", "/v1/jobs/a")):
                asked = {**ELSEWHERE, "Access-Control-Request-Method": method}
                for answer in (await http.request(method, path, **call), await http.options(path, headers=asked)):
                    assert answer.status_code in (401, 405), kind
                    assert not [name for name in answer.headers if name.startswith(("access-control-", "set-cookie"))]
    assert await everything(redis, keys) == {}


async def test_a_gateway_without_a_token_serves_no_page_of_any_site(
    for_everybody: httpx.AsyncClient, redis: Redis, keys: Keys
) -> None:
    """Guards `origin is None` in `Access`: a page can send JSON of no type without asking, and names its origin."""
    for origin in ("https://evil.example", "null", "http://127.0.0.1:8000", ""):
        answer = await for_everybody.post("/v1/jobs", content=b'{"prompt":"a"}', headers={"Origin": origin})
        assert (answer.status_code, answer.json()["error_code"]) == (401, "UNAUTHORIZED"), origin
        assert (await for_everybody.delete("/v1/jobs/a", headers={"Origin": origin})).status_code == 401
    assert await everything(redis, keys) == {}
    assert (await for_everybody.post("/v1/jobs", json=PROMPT)).status_code == 202


WRONG = [
    b"Bearer wrong",
    f"Bearer {TOKEN}x".encode(),
    f"Bearer {TOKEN[:-1]}".encode(),
    f"Bearer {TOKEN.upper()}".encode(),
    f"Bearer {TOKEN}, Bearer {TOKEN}".encode(),
    b"Bearer \xe4\xff",
    f"Basic {TOKEN}".encode(),
    b"Bearer",
    b"",
]


async def test_a_wrong_token_is_compared_in_constant_time(
    http: httpx.AsyncClient, redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards `secrets.compare_digest` in `Access`: no other comparison decides."""
    compared = []

    class Noting:
        @staticmethod
        def compare_digest(given: bytes, token: bytes) -> bool:
            compared.append(token)
            return secrets.compare_digest(given, token)

    monkeypatch.setattr(access, "secrets", Noting)
    for credentials in WRONG:
        answer = await http.post("/v1/jobs", json=PROMPT, headers={b"Authorization": credentials})
        assert (answer.status_code, answer.json()["error_code"]) == (401, "UNAUTHORIZED"), credentials
        assert TOKEN not in answer.text
    assert compared == [TOKEN.encode()] * len(WRONG)
    assert await everything(redis, keys) == {}


TRAVERSAL = {
    "up": "../waits",
    "up, with the slash in percent": "..%2fwaits",
    "up, all in percent": "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "percent of percent": "%252e%252e%252fwaits",
    "backslash": "..%5cwaits",
    "NUL": "waits%00",
    "newline": "waits%0d%0aX-Evil:%201",
    "matrix": "waits;a=b",
    "star": "*",
    "long": "x" * 65,
}


@pytest.mark.usefixtures("jobs")
async def test_an_id_that_is_a_path_is_not_found(http: httpx.AsyncClient, redis: Redis, keys: Keys) -> None:
    """Guards the client's pattern of job ids, which is asked before any key is made of one."""
    before = await everything(redis, keys)
    for kind, job_id in TRAVERSAL.items():
        for method, rest in (("GET", ""), ("DELETE", ""), ("GET", "/events")):
            target = f"/v1/jobs/{job_id}{rest}".encode()
            answer = await http.send(http.build_request(method, "/", extensions={"target": target}))
            assert answer.status_code == 404, (kind, method, rest)
            assert "x-evil" not in answer.headers
        key = {"Idempotency-Key": job_id}
        assert (await http.post("/v1/jobs", json=PROMPT, headers=key)).status_code == 400, kind
        assert (await http.post("/v1/jobs", json={**PROMPT, "job_id": job_id})).status_code == 400, kind
    assert await everything(redis, keys) == before
