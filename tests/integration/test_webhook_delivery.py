"""One attempt after the other over real HTTP on loopback, and what the delivery's row says of it."""

import asyncio
import socket
from collections.abc import Iterator
from datetime import timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from sqlalchemy import Engine, delete
from standardwebhooks import Webhook

from producer.database import open_engine
from producer.settings import ProducerSettings
from producer.tables import EVENTS
from producer.webhooks.delivery import DELAYS_S, MAX_ATTEMPTS, DeliveryFailed, read_rules
from producer.webhooks.receiver import verify
from producer.webhooks.signing import read_secrets
from schemas.net.urls import HostRules
from tests import event_kit
from tests.integration.webhook_kit import HOOK, SECRET, Bench
from tests.s3_stub import Reply, S3Stub, content, endless, reset, silence, slow, status, truncated

EVENT = event_kit.succeeded()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """SQLite alone: what is tried on both is in test_webhook_rows.py."""
    engine = open_engine(f"sqlite:///{tmp_path}/listener.db")
    yield engine
    engine.dispose()


@pytest.fixture
async def bench(engine: Engine, stub: S3Stub) -> Bench:
    return Bench(engine, stub)


async def outcome(bench: Bench, *replies: Reply, **options: Any) -> tuple[str, int | None, str | None]:
    """State, status and error of a delivery after one attempt that is answered so."""
    if replies:
        bench.stub.answer(HOOK, *replies)
    event_id = bench.add(EVENT)
    try:
        await bench.attempt(event_id, **options)
    except DeliveryFailed:
        assert bench.row(event_id).state == "failed"
    row = bench.row(event_id)
    return row.state, row.status, row.error


async def test_a_webhook_is_the_events_own_bytes_signed_under_its_id(bench: Bench) -> None:
    bench.stub.answer(HOOK, status(204))
    assert await bench.attempt(bench.add(EVENT)) is None
    [seen] = bench.hooks
    assert (seen.method, seen.body, seen.query) == ("POST", EVENT.encode(), "")
    assert seen.headers["webhook-id"] == EVENT.id
    assert seen.headers["Content-Type"] == "application/json"
    assert seen.headers["Content-Length"] == str(len(EVENT.encode()))
    assert seen.headers["User-Agent"] == "modal-sdxl-lora"
    assert verify(seen.body, seen.headers, SECRET) == EVENT
    assert Webhook(SECRET).verify(seen.body, seen.headers)["id"] == EVENT.id
    row = bench.row(EVENT.id)
    assert (row.state, row.status, row.error, row.attempts, row.ended_at) == ("delivered", 204, None, 1, bench.now)


@pytest.mark.parametrize("code", [200, 201, 202, 204, 299])
async def test_every_2xx_is_a_success(bench: Bench, code: int) -> None:
    assert await outcome(bench, status(code)) == ("delivered", code, None)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
async def test_a_redirect_is_a_failure_and_is_not_followed(bench: Bench, code: int) -> None:
    bench.stub.answer("/trap", status(200))
    reply = status(code, Location=f"{bench.stub.url}/trap")
    assert await outcome(bench, reply) == ("pending", code, f"answered {code}")
    assert [seen.path for seen in bench.stub.seen] == [HOOK]


@pytest.mark.parametrize("code", [304, 400, 401, 403, 404, 409, 418, 429, 500, 501, 502, 503, 504])
async def test_every_other_answer_is_tried_again(bench: Bench, code: int) -> None:
    assert await outcome(bench, status(code)) == ("pending", code, f"answered {code}")
    assert bench.row(EVENT.id).due_at == bench.now + timedelta(seconds=DELAYS_S[0])


async def test_each_attempt_has_a_time_and_a_signature_of_its_own_and_the_same_id(bench: Bench) -> None:
    bench.stub.answer(HOOK, status(500))
    event_id = bench.add(EVENT)
    await bench.attempt(event_id)
    bench.later(100)
    await bench.attempt(event_id)
    first, second = (seen.headers for seen in bench.hooks)
    assert first["webhook-id"] == second["webhook-id"]
    assert int(second["webhook-timestamp"]) - int(first["webhook-timestamp"]) == 100
    assert first["webhook-signature"] != second["webhook-signature"]


async def test_the_schedule_is_the_standards_and_ends_in_failure(bench: Bench) -> None:
    bench.stub.answer(HOOK, status(500))
    event_id = bench.add(EVENT)
    delays = []
    for _ in range(MAX_ATTEMPTS - 1):
        delay_s = await bench.attempt(event_id)
        assert delay_s is not None
        assert bench.row(event_id).due_at == bench.now + timedelta(seconds=delay_s)
        delays.append(delay_s)
        bench.later(delay_s)
    minute, hour = 60, 3600
    assert delays == [5, 5 * minute, 30 * minute, 2 * hour, 5 * hour, 10 * hour, 14 * hour, 20 * hour, 24 * hour]
    with pytest.raises(DeliveryFailed, match="answered 500"):
        await bench.attempt(event_id)
    row = bench.row(event_id)
    assert (row.state, row.attempts, row.status, row.error) == ("failed", 10, 500, "answered 500")
    assert row.ended_at == bench.now
    with pytest.raises(DeliveryFailed):  # so that RQ has it in its failed registry, however often it is run
        await bench.attempt(event_id)
    assert len(bench.hooks) == 10


async def test_jitter_makes_delays_longer_by_up_to_a_tenth(bench: Bench) -> None:
    bench.stub.answer(HOOK, status(500))
    assert await bench.attempt(bench.add(EVENT), uniform=lambda low, high: high) == pytest.approx(5.5)


@pytest.mark.parametrize("code", [429, 502, 503, 504])
async def test_a_busy_receiver_says_when_to_come_back(bench: Bench, code: int) -> None:
    bench.stub.answer(HOOK, status(code, Retry_After="120"))
    assert await bench.attempt(bench.add(EVENT)) == 120
    assert bench.row(EVENT.id).due_at == bench.now + timedelta(seconds=120)


@pytest.mark.parametrize(
    ("code", "retry_after", "delay_s"),
    [(503, "1", 5), (503, "soon", 5), (503, "-9", 5), (503, "999999999", 86_400), (500, "120", 5), (404, "120", 5)],
)
async def test_retry_after_only_ever_delays_and_has_a_limit(
    bench: Bench, code: int, retry_after: str, delay_s: float
) -> None:
    bench.stub.answer(HOOK, status(code, Retry_After=retry_after))
    assert await bench.attempt(bench.add(EVENT)) == delay_s


async def test_retry_after_may_be_a_date(bench: Bench) -> None:
    bench.now = bench.now.replace(microsecond=0)
    when = format_datetime(bench.now + timedelta(seconds=90), usegmt=True)
    bench.stub.answer(HOOK, status(503, Retry_After=when))
    assert await bench.attempt(bench.add(EVENT)) == 90


async def test_410_disables_the_endpoint_and_later_deliveries_end_without_a_request(bench: Bench) -> None:
    waiting = bench.add(event_kit.failed("job-2"))
    elsewhere = bench.add(event_kit.failed("job-3"), url=bench.stub.url + "/other")
    bench.stub.answer("/other", status(200))
    assert await outcome(bench, status(410)) == ("disabled", 410, "answered 410 Gone")
    assert [one.url for one in bench.rows.disabled_endpoints()] == [bench.stub.url + HOOK]
    for event_id in (waiting, bench.add(event_kit.failed("job-4"))):
        assert await bench.attempt(event_id) is None
        assert (bench.row(event_id).state, bench.row(event_id).attempts) == ("disabled", 0)
    assert len(bench.hooks) == 1
    await bench.attempt(elsewhere)
    assert bench.row(elsewhere).state == "delivered"


async def test_an_enabled_endpoint_gets_its_webhooks_again(bench: Bench) -> None:
    await outcome(bench, status(410), status(200))
    assert bench.rows.enable(bench.stub.url + HOOK)
    assert bench.rows.revive([EVENT.id]) == [EVENT.id]
    await bench.attempt(EVENT.id)
    assert bench.row(EVENT.id).state == "delivered"


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (reset(), "the connection broke"),
        (silence(), "a deadline passed"),
    ],
    ids=["reset", "silence"],
)
async def test_a_broken_exchange_is_tried_again(bench: Bench, reply: Reply, error: str) -> None:
    state, code, problem = await outcome(bench, reply)
    assert (state, code) == ("pending", None)
    assert error in str(problem)
    assert len(bench.hooks) == 1  # and never by the HTTP client on its own


@pytest.mark.parametrize("reply", [slow(0.01), endless(), truncated(b"x" * 100, 5)], ids=["slow", "endless", "cut"])
async def test_a_success_is_one_whatever_its_body_does(bench: Bench, reply: Reply) -> None:
    assert await outcome(bench, reply) == ("delivered", 200, None)


async def test_what_the_receiver_says_is_kept_nowhere(bench: Bench) -> None:
    async def complain(request: web.Request) -> web.Response:
        return web.Response(status=500, reason="SECRET REASON", text="SECRET BODY", headers={"X-Secret": "SECRET"})

    await outcome(bench, complain)
    assert "SECRET" not in repr(bench.row(EVENT.id))


async def test_headers_that_drip_end_at_the_deadline(bench: Bench) -> None:
    ended = asyncio.Event()

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while not writer.is_closing():
            writer.write(b"x: y\r\n")
            await asyncio.sleep(0.02)
        ended.set()

    async with await asyncio.start_server(drip, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        event_id = bench.add(EVENT, url=f"http://127.0.0.1:{port}{HOOK}")
        await bench.attempt(event_id)
        await ended.wait()
    assert (bench.row(event_id).state, bench.row(event_id).error) == ("pending", "a deadline passed")


async def test_nobody_there_is_tried_again(bench: Bench) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        event_id = bench.add(EVENT, url=f"http://127.0.0.1:{unused.getsockname()[1]}{HOOK}")
        await bench.attempt(event_id)
    assert (bench.row(event_id).state, bench.row(event_id).error) == ("pending", "no connection")


async def test_tls_that_fails_is_tried_again(bench: Bench) -> None:
    event_id = bench.add(EVENT, url=bench.stub.url.replace("http://", "https://") + HOOK)
    await bench.attempt(event_id)
    assert (bench.row(event_id).state, bench.row(event_id).error) == ("pending", "TLS failed")


class Answers(AbstractResolver):
    """A name server that answers with these addresses."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        if not self.addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            ResolveResult(hostname=host, host=address, port=port, family=socket.AF_INET, proto=0, flags=0)
            for address in self.addresses
        ]

    async def close(self) -> None:
        self.addresses = ()


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["10.0.0.1"], ["8.8.8.8", "169.254.169.254"], ["::1"]])
async def test_a_name_that_resolves_to_a_private_address_is_never_delivered_to(
    bench: Bench, addresses: list[str]
) -> None:
    event_id = bench.add(EVENT, url="https://hooks.example/sdxl")
    with pytest.raises(DeliveryFailed, match="not public"):
        await bench.attempt(event_id, rules=HostRules(any_public=True), resolver=Answers(*addresses))
    assert (bench.row(event_id).state, bench.row(event_id).attempts) == ("failed", 1)


async def test_a_name_that_does_not_resolve_is_tried_again(bench: Bench) -> None:
    event_id = bench.add(EVENT, url="https://hooks.example/sdxl")
    await bench.attempt(event_id, rules=HostRules(any_public=True), resolver=Answers())
    assert bench.row(event_id).error == "the name does not resolve"


@pytest.mark.parametrize(
    "rules", [HostRules(any_public=True), HostRules(), HostRules.parse("127.0.0.1", default=HostRules())]
)
async def test_a_forbidden_url_fails_at_once_without_a_request(bench: Bench, rules: HostRules) -> None:
    event_id = bench.add(EVENT)
    with pytest.raises(DeliveryFailed, match="may not be opened"):
        await bench.attempt(event_id, rules=rules)
    assert bench.stub.seen == []


def settings(**environment: str) -> ProducerSettings:
    return ProducerSettings.model_validate(environment)


def test_the_settings_say_where_webhooks_may_go() -> None:
    assert read_rules(settings(LORA_ALLOW_LOOPBACK="true")) == HostRules(any_public=True)
    read_rules(settings(LORA_ALLOW_LOOPBACK="true", WEBHOOK_ALLOWED_HOSTS="127.0.0.1")).check("http://127.0.0.1:1/a")
    listed = read_rules(settings(WEBHOOK_ALLOWED_HOSTS="hooks.example"))
    assert (listed.any_public, listed.allow_loopback) == (False, False)
    with pytest.raises(ValueError, match="not host"):
        read_rules(settings(WEBHOOK_ALLOWED_HOSTS="https://hooks.example"))


async def test_an_event_id_that_could_confuse_a_signature_or_a_header_is_refused(bench: Bench) -> None:
    for number, name in enumerate(["a.1", "a\r\nX-Injected: 1", "ü", "a b"]):
        event_id = bench.add(EVENT.model_copy(update={"id": f"{name}{number}"}))
        with pytest.raises(DeliveryFailed, match="not of this contract"):
            await bench.attempt(event_id)
    assert bench.stub.seen == []


async def test_a_delivery_whose_event_is_gone_fails(bench: Bench) -> None:
    event_id = bench.add(EVENT)
    with bench.engine.begin() as connection:
        connection.execute(delete(EVENTS))
    with pytest.raises(DeliveryFailed, match="no longer kept"):
        await bench.attempt(event_id)
    assert bench.row(event_id).state == "failed"


async def test_what_is_delivered_or_unknown_is_not_sent(bench: Bench) -> None:
    await outcome(bench, status(200))
    assert await bench.attempt(EVENT.id) is None
    assert await bench.attempt("nobody:1:succeeded") is None
    assert len(bench.hooks) == 1


async def test_an_attempt_is_counted_before_it_is_made(bench: Bench) -> None:
    seen: list[tuple[int, str]] = []

    async def look(request: web.Request) -> web.Response:
        row = await asyncio.to_thread(bench.row, EVENT.id)
        seen.append((row.attempts, row.state))
        assert row.due_at == bench.now + timedelta(seconds=5)
        return web.Response()

    assert await outcome(bench, look) == ("delivered", 200, None)
    assert seen == [(1, "pending")]


async def test_attempts_that_killed_their_process_are_bounded_too(bench: Bench) -> None:
    event_id = bench.add(EVENT)
    bench.change(event_id, attempts=MAX_ATTEMPTS)
    with pytest.raises(DeliveryFailed, match="nothing was heard of the last attempt"):
        await bench.attempt(event_id)
    assert bench.row(event_id).state == "failed"
    assert bench.stub.seen == []


async def test_while_secrets_rotate_both_sign(bench: Bench) -> None:
    older = SECRET.replace("whsec_", "whsec_AAAA")
    await outcome(bench, content(b"ok"), secrets=read_secrets(f"{SECRET},{older}"))
    [seen] = bench.hooks
    for secret in (SECRET, older):
        assert verify(seen.body, seen.headers, secret) == EVENT


async def test_a_job_that_comes_before_its_time_sends_nothing_and_is_told_when(bench: Bench) -> None:
    event_id = bench.add()
    bench.rows.postpone(event_id, 0, 3600, 503, "answered 503")
    assert await bench.attempt(event_id) == 3600
    assert (bench.hooks, bench.row(event_id).attempts) == ([], 0)
