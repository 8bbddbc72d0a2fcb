"""`python -m producer serve` as a process: how it starts, what it logs, how it ends, what is left when it is killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from redis import Redis

from demo.servers import RedisServer, S3Server
from schemas.keys import Keys
from tests import event_kit
from tests.integration.cli_kit import Cli
from tests.integration.gateway_kit import BUCKET, PROMPT, TOKEN

BEARER = {"Authorization": f"Bearer {TOKEN}"}


@dataclass
class Process:
    """A gateway that runs."""

    popen: "subprocess.Popen[str]"
    url: str
    log: Path

    def end(self, number: int, within_s: float = 30) -> int:
        self.popen.send_signal(number)
        return self.popen.wait(within_s)


@pytest.fixture
def environment(redis_at: RedisServer, s3_at: S3Server, keys: Keys) -> dict[str, str]:
    s3_at.create_bucket(BUCKET)
    return {
        "REDIS_URL": redis_at.url,
        "SDXL_PREFIX": keys.prefix,
        "MODAL_API_TOKEN": TOKEN,
        "R2_ENDPOINT_URL": s3_at.url,
        "R2_BUCKET_NAME": BUCKET,
        "R2_ACCESS_KEY_ID": s3_at.access_key,
        "R2_SECRET_ACCESS_KEY": s3_at.secret_key,
    }


@contextmanager
def serving(folder: Path, environment: dict[str, str]) -> Iterator[Process]:
    log = folder / "serve.log"
    command = [sys.executable, "-m", "producer", "serve", "--port", "0", "--json"]
    with log.open("wb") as err:
        popen = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=err, text=True
        )
    assert popen.stdout is not None
    try:
        line = popen.stdout.readline()
        assert line, log.read_text()
        yield Process(popen, json.loads(line)["url"], log)
    finally:
        popen.kill()
        popen.wait()
        popen.stdout.close()


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@contextmanager
def asking(url: str, answers: list[httpx.Response], key: str) -> Iterator[None]:
    """A synchronous call in a thread; its answer, if one comes, is in `answers`."""

    def ask() -> None:
        headers = {**BEARER, "Idempotency-Key": key}
        with suppress(httpx.HTTPError):  # the gateway may be killed
            answers.append(httpx.post(f"{url}/generate-image", json=PROMPT, headers=headers, timeout=30))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        thread.join(30)


def test_it_serves_until_a_signal_and_ends_well_with_an_answer_for_those_who_wait(
    tmp_path: Path, environment: dict[str, str], redis_at: RedisServer, keys: Keys
) -> None:
    answers: list[httpx.Response] = []
    with serving(tmp_path, environment) as gateway, Redis.from_url(redis_at.url) as redis:
        assert httpx.get(f"{gateway.url}/health").json()["status"] == "ok"
        assert httpx.get(f"{gateway.url}/v1/jobs/a?token=s3cr3t").status_code == 401
        with asking(gateway.url, answers, "order-1"):
            until(lambda: redis.hget(keys.job("order-1"), "caller") == b"waits")
            assert gateway.end(signal.SIGTERM) == 0
        assert redis.hget(keys.job("order-1"), "state") == b"cancelled"
        log = gateway.log.read_text()
    [answer] = answers
    assert (answer.status_code, answer.json()["error_code"]) == (503, "UNAVAILABLE")
    assert '"GET /v1/jobs/a HTTP/1.1" 401' in log
    assert "s3cr3t" not in log
    assert "Traceback" not in log


def test_it_ends_in_time_while_the_storage_hangs(
    tmp_path: Path, environment: dict[str, str], redis_at: RedisServer, keys: Keys
) -> None:
    answers: list[httpx.Response] = []
    with socket.create_server(("127.0.0.1", 0)) as storage, Redis.from_url(redis_at.url) as redis:
        storage.settimeout(20)
        environment["R2_ENDPOINT_URL"] = f"http://127.0.0.1:{storage.getsockname()[1]}"
        with serving(tmp_path, environment) as gateway:
            body = {**PROMPT, "job_id": "order-1"}
            assert httpx.post(f"{gateway.url}/v1/jobs", json=body, headers=BEARER).status_code == 202
            event = event_kit.succeeded("order-1", image_key="images/a.png", image_sha256="a" * 64)
            redis.hset(keys.job("order-1"), mapping={"state": "succeeded", "event": event.encode(), "ended_at": 1})
            with asking(gateway.url, answers, "order-1"):
                connection, _ = storage.accept()  # and nothing comes out of it
                with connection:
                    assert gateway.end(signal.SIGTERM) == 0
    [answer] = answers
    assert (answer.status_code, answer.json()["error_code"]) == (503, "UNAVAILABLE")


def test_a_gateway_that_was_killed_keeps_no_job_from_being_cancelled_for_long(
    tmp_path: Path, environment: dict[str, str], redis_at: RedisServer, keys: Keys
) -> None:
    with serving(tmp_path, environment) as killed, Redis.from_url(redis_at.url) as redis:
        with asking(killed.url, [], "order-1"):
            until(lambda: redis.hget(keys.job("order-1"), "caller") == b"waits")
            assert killed.end(signal.SIGKILL) == -signal.SIGKILL
        [(_, until_ms)] = redis.zrange(keys.waiters("order-1"), 0, -1, withscores=True)
        seconds, _ = redis.time()
        assert until_ms / 1000 - seconds <= 31
        assert 0 < redis.pttl(keys.waiters("order-1")) <= 30_000


def test_without_a_token_it_serves_this_machine_alone_and_says_so(
    tmp_path: Path, environment: dict[str, str], cli: Cli
) -> None:
    del environment["MODAL_API_TOKEN"]
    with serving(tmp_path, environment) as gateway:
        assert httpx.post(f"{gateway.url}/v1/jobs", json=PROMPT).status_code == 202
        assert gateway.end(signal.SIGINT) == 0
        assert "MODAL_API_TOKEN is not set" in gateway.log.read_text()
    for host in ("::", "gateway.example", "192.0.2.1"):
        cli.run("serve", "--host", host)
        assert (cli.status, "MODAL_API_TOKEN" in cli.err) == (2, True)


def test_answers_are_sent_at_once(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    taken: list[int] = []

    async def run(_app: object, listening: socket.socket, _when_ready: object) -> None:
        with listening, socket.create_connection(listening.getsockname()), listening.accept()[0] as accepted:
            taken.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr("producer.gateway.server.run", run)
    cli.run("serve", "--port", "0", MODAL_API_TOKEN=TOKEN)
    assert taken
    assert all(taken)


def test_what_cannot_be_served_is_bad_usage(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        cli.run("serve", "--port", str(taken.getsockname()[1]), MODAL_API_TOKEN=TOKEN)
        assert (cli.status, "cannot listen" in cli.err) == (2, True)
    cli.run("serve", REDIS_URL="http://:pa55word@nowhere", MODAL_API_TOKEN=TOKEN)
    assert (cli.status, "REDIS_URL" in cli.err, "pa55word" in cli.err) == (2, True, False)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    cli.run("serve")
    assert cli.status == 2
    assert "pip install '.[gateway]'" in cli.err
