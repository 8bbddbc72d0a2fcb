"""The rows of deliveries, on SQLite and on PostgreSQL."""

import threading
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine

from producer.tables import DELIVERED, DISABLED, GAVE_UP, PENDING
from producer.webhooks.rows import Delivery
from tests import event_kit
from tests.integration.webhook_kit import Bench
from tests.s3_stub import S3Stub

URL = "https://hooks.example/sdxl"


@pytest.fixture
def bench(engine: Engine) -> Bench:
    return Bench(engine, S3Stub("http://127.0.0.1:1"))


def test_what_the_listener_has_written_is_loaded_with_the_events_own_bytes(bench: Bench) -> None:
    event = event_kit.failed("job-7", error="ü \U0001f58c \\u0041")
    event_id = bench.add(event, URL)
    outgoing = bench.rows.load(event_id)
    assert outgoing is not None
    assert outgoing.body == event.encode()
    assert not outgoing.is_disabled
    assert outgoing.delivery == bench.rows.get(event_id)
    assert outgoing.delivery == Delivery(event_id, "job-7", URL, PENDING, 0, bench.now, None, None, bench.now, None)
    assert bench.rows.load("nobody") is None
    assert bench.rows.get("nobody") is None


def test_one_of_two_that_begin_the_same_attempt_may_make_it(bench: Bench) -> None:
    event_id = bench.add(url=URL)
    delivery = bench.row(event_id)
    together = threading.Barrier(4)
    begun = []

    def begin() -> None:
        together.wait()
        begun.append(bench.rows.begin(delivery, 5))

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(begun) == [False, False, False, True]
    assert (bench.row(event_id).attempts, bench.row(event_id).due_at) == (1, bench.now + timedelta(seconds=5))


@pytest.mark.parametrize("state", [DELIVERED, GAVE_UP, DISABLED])
def test_what_has_ended_is_not_changed_by_attempts_that_come_late(bench: Bench, state: str) -> None:
    event_id = bench.add(url=URL)
    before = bench.row(event_id)
    bench.rows.end(event_id, state, 200, None)
    ended = bench.row(event_id)
    bench.later(60)
    assert not bench.rows.begin(before, 5)
    bench.rows.postpone(event_id, 0, 5, 500, "late")
    bench.rows.give_up(event_id, 0, 500, "late")
    bench.rows.end(event_id, GAVE_UP if state == DELIVERED else DELIVERED, 500, "late")
    assert bench.row(event_id) == ended


def test_what_is_overdue_is_pending_and_past_its_grace(bench: Bench) -> None:
    ids = [bench.add(event_kit.failed(f"job-{number}"), URL) for number in range(4)]
    bench.rows.end(ids[3], DELIVERED, 200, None)
    bench.rows.postpone(ids[2], 0, 100, 500, "no")
    bench.rows.postpone(ids[0], 0, 10, 500, "no")
    bench.later(41)
    assert bench.rows.overdue(30, 10) == [ids[1], ids[0]]
    assert bench.rows.overdue(30, 1) == [ids[1]]
    assert bench.rows.overdue(40, 10) == [ids[1]]
    assert bench.rows.overdue(60, 10) == []


def test_a_disabled_endpoint_is_one_url_and_the_first_reason_stays(bench: Bench) -> None:
    event_id = bench.add(url=URL)
    bench.rows.disable(URL, "first")
    bench.later(5)
    bench.rows.end_with_endpoint(bench.row(event_id), 410, "second")
    [endpoint] = bench.rows.disabled_endpoints()
    assert (endpoint.url, endpoint.reason, endpoint.disabled_at) == (URL, "first", bench.now - timedelta(seconds=5))
    outgoing = bench.rows.load(event_id)
    assert outgoing is not None
    assert outgoing.is_disabled
    assert (outgoing.delivery.state, outgoing.delivery.status) == (DISABLED, 410)
    assert bench.rows.enable(URL)
    assert not bench.rows.enable(URL)


def test_a_revived_delivery_is_as_new(bench: Bench) -> None:
    event_id = bench.add(url=URL)
    as_new = bench.row(event_id)
    assert bench.rows.begin(as_new, 5)
    bench.rows.end(event_id, GAVE_UP, 500, "answered 500")
    assert bench.rows.revive([event_id, "nobody"]) == [event_id]
    assert bench.row(event_id) == as_new


def test_an_attempt_that_was_under_way_says_nothing_of_a_revived_delivery(bench: Bench) -> None:
    event_id = bench.add(url=URL)
    before = bench.row(event_id)
    assert bench.rows.begin(before, 60)
    assert bench.rows.revive([event_id]) == [event_id]
    bench.rows.postpone(event_id, 1, 3600, 500, "answered 500")
    bench.rows.give_up(event_id, 1, 500, "answered 500")
    assert (bench.row(event_id).state, bench.row(event_id).error) == (PENDING, None)


def test_a_delivery_to_a_disabled_endpoint_is_not_revived(bench: Bench) -> None:
    event_id, other = bench.add(url=URL), bench.add(event_kit.failed("job-2"), URL + "/other")
    bench.rows.end_with_endpoint(bench.row(event_id), 410, "gone")
    assert bench.rows.revive([event_id, other]) == [other]
    assert bench.row(event_id).state == DISABLED


def test_more_deliveries_than_fit_into_one_statement_are_revived_and_found(bench: Bench) -> None:
    event_id = bench.add(url=URL)
    many = [f"nobody-{number}" for number in range(1100)] + [event_id]
    assert bench.rows.revive(many) == [event_id]
    assert [delivery.event_id for delivery in bench.rows.among(many)] == [event_id]


def test_deliveries_are_found_by_all_that_is_asked_for_the_newest_first(bench: Bench) -> None:
    ids = []
    for number in range(3):
        ids.append(bench.add(event_kit.failed("job-1", run=number + 1), URL))
        bench.later(1)
    other = bench.add(event_kit.failed("job-2"), URL + "/other")
    bench.rows.end(ids[1], DELIVERED, 200, None)

    def found(**wanted: Any) -> list[str]:
        return [delivery.event_id for delivery in bench.rows.find(**wanted)]

    assert found() == [other, *reversed(ids)]
    assert found(limit=2) == [other, ids[2]]
    assert found(state=DELIVERED) == [ids[1]]
    assert found(job_id="job-1", state=PENDING) == [ids[2], ids[0]]
    assert found(url=URL + "/other") == [other]
    assert found(url=URL + "/oth") == []
