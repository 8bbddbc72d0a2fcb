"""The commands that look after deliveries and endpoints."""

import json
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from demo.servers import RedisServer
from producer.database import open_engine
from producer.tables import DELIVERED, DISABLED, GAVE_UP, PENDING
from producer.webhooks.queue import WebhookQueue
from schemas.keys import Keys
from tests import event_kit
from tests.integration.cli_kit import Cli
from tests.integration.webhook_kit import Bench
from tests.s3_stub import S3Stub

URL = "https://hooks.example/sdxl"


@pytest.fixture
def engine(cli: Cli) -> Iterator[Engine]:
    engine = open_engine(cli.environment["DATABASE_URL"])
    yield engine
    engine.dispose()


@pytest.fixture
def bench(engine: Engine) -> Bench:
    return Bench(engine, S3Stub("http://127.0.0.1:1"))


@pytest.fixture
def queue(redis_at: RedisServer, keys: Keys) -> Iterator[WebhookQueue]:
    queue = WebhookQueue(redis_at.url, keys.prefix)
    yield queue
    queue.close()


@pytest.fixture
def ids(bench: Bench) -> list[str]:
    """One delivery in each state, the oldest first: pending, delivered, failed, disabled."""
    ids = []
    for number in range(4):
        ids.append(bench.add(event_kit.failed(f"job-{number}"), URL if number < 3 else f"{URL}/gone"))
        bench.later(1)
    assert bench.rows.begin(bench.row(ids[2]), 5)
    bench.rows.end(ids[1], DELIVERED, 204, None)
    bench.rows.end(ids[2], GAVE_UP, 500, "answered 500")
    bench.rows.end_with_endpoint(bench.row(ids[3]), 410, "answered 410 Gone")
    return ids


def listed(cli: Cli, *options: str) -> list[str]:
    return [delivery["event_id"] for delivery in cli.run_json("webhooks", "list", *options)]


def test_deliveries_are_listed_the_newest_first_with_what_became_of_them(
    cli: Cli, bench: Bench, ids: list[str]
) -> None:
    lines = cli.run("webhooks", "list").splitlines()
    assert " ".join(lines[0].split()) == "event state attempts status due or ended at endpoint error"
    assert [line.split()[0] for line in lines[1:]] == list(reversed(ids))
    state, attempts, code, day, _, url, *error = lines[2].split()[1:]
    assert (state, attempts, code, url, error) == ("failed", "1", "500", URL, ["answered", "500"])
    assert day == bench.now.date().isoformat()


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--state", "failed"], [2]),
        (["--job", "job-1"], [1]),
        (["--endpoint", f"{URL}?token=s3cr3t"], [2, 1, 0]),
        (["--endpoint", URL, "--state", "pending"], [0]),
        (["--limit", "2"], [3, 2]),
        (["--job", "nobody"], []),
    ],
)
def test_filters_narrow_the_list(cli: Cli, ids: list[str], options: list[str], found: list[int]) -> None:
    assert listed(cli, *options) == [ids[number] for number in found]


def test_an_empty_list_says_so(cli: Cli, bench: Bench) -> None:
    assert cli.run("webhooks", "list").strip() == "no deliveries"
    assert cli.run("webhooks", "disabled").strip() == "no disabled endpoints"


def test_one_delivery_is_shown_with_everything_that_is_known(cli: Cli, bench: Bench, ids: list[str]) -> None:
    document = cli.run_json("webhooks", "show", ids[2])
    row = bench.row(ids[2])
    assert document == {
        "event_id": ids[2],
        "job_id": "job-2",
        "url": URL,
        "state": "failed",
        "attempts": 1,
        "due_at": row.due_at.isoformat(),
        "status": 500,
        "error": "answered 500",
        "created_at": row.created_at.isoformat(),
        "ended_at": bench.now.isoformat(),
    }
    assert "answered 500" in cli.run("webhooks", "show", ids[2])
    cli.run("webhooks", "show", "nobody:1:failed")
    assert cli.status == 2
    assert "no delivery of nobody:1:failed" in cli.err


def test_what_failed_is_retried_in_the_row_and_in_rq(
    cli: Cli, bench: Bench, queue: WebhookQueue, ids: list[str]
) -> None:
    assert cli.run("webhooks", "retry", "--state", "failed").strip() == "retried 1 of 1"
    row = bench.row(ids[2])
    assert (row.state, row.attempts, row.error, row.ended_at) == (PENDING, 0, None, None)
    assert queue.rq.job_ids == [queue.job_id(ids[2])]
    assert cli.run("webhooks", "retry", "--state", "failed").strip() == "retried 0 of 0"
    assert cli.status == 0


def test_named_deliveries_are_retried_whatever_their_state_and_once_each(
    cli: Cli, bench: Bench, queue: WebhookQueue, ids: list[str]
) -> None:
    queue.put_back(ids[0], bench.now.replace(year=bench.now.year + 1))
    assert cli.run_json("webhooks", "retry", ids[0], ids[1], ids[0]) == {"retried": ids[:2], "left": []}
    assert {bench.row(event_id).state for event_id in ids[:2]} == {PENDING}
    assert set(queue.rq.job_ids) == {queue.job_id(event_id) for event_id in ids[:2]}
    assert queue.rq.scheduled_job_registry.get_job_ids() == []


def test_what_is_unknown_or_goes_to_a_disabled_endpoint_is_left_and_named(
    cli: Cli, bench: Bench, queue: WebhookQueue, ids: list[str]
) -> None:
    cli.run("webhooks", "retry", "nobody:1:failed", ids[3], ids[2])
    assert cli.status == 2
    assert cli.out.strip() == "retried 1 of 3"
    assert cli.err.count("no such delivery, or its endpoint is disabled") == 2
    assert bench.row(ids[3]).state == DISABLED
    assert queue.rq.job_ids == [queue.job_id(ids[2])]


@pytest.mark.parametrize("arguments", [[], ["a:1:failed", "--state", "failed"], ["--state", "odd"]])
def test_a_retry_is_of_named_events_or_of_a_state(cli: Cli, bench: Bench, arguments: list[str]) -> None:
    cli.run("webhooks", "retry", *arguments)
    assert cli.status == 2


def test_an_endpoint_is_disabled_and_enabled_without_its_query(cli: Cli, bench: Bench) -> None:
    assert cli.run("webhooks", "disable", f"{URL}?token=s3cr3t", "--reason", "too slow").strip() == f"disabled {URL}"
    [endpoint] = cli.run_json("webhooks", "disabled")
    assert (endpoint["url"], endpoint["reason"]) == (URL, "too slow")
    assert "too slow" in cli.run("webhooks", "disabled")
    assert cli.run_json("webhooks", "disable", URL) == {"disabled": URL}
    assert cli.run_json("webhooks", "enable", URL) == {"enabled": URL}
    assert cli.run_json("webhooks", "disabled") == []
    cli.run("webhooks", "enable", URL)
    assert cli.status == 2
    assert "is not disabled" in cli.err


def test_a_reason_and_an_error_do_not_act_on_the_terminal(cli: Cli, bench: Bench, ids: list[str]) -> None:
    bench.change(ids[0], error="\x1b[31mred")
    cli.run("webhooks", "disable", URL, "--reason", "\x1b[31mred")
    assert "\x1b" not in cli.run("webhooks", "list") + cli.run("webhooks", "disabled")


def test_a_database_out_of_reach_is_status_3_and_one_line(cli: Cli, bench: Bench) -> None:
    url = "postgresql+psycopg://user:s3cr3t@127.0.0.1:1/none"
    document = json.loads(cli.run("webhooks", "list", "--json", DATABASE_URL=url))
    assert cli.status == 3
    assert document["error"]["kind"] == "OperationalError"
    assert "s3cr3t" not in cli.out + cli.err
