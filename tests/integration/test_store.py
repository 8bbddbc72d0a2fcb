"""The listener's tables on SQLite and PostgreSQL: each event once, jobs that only move forward, nothing secret."""

import itertools
import json
import random
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from producer.completions import decode_completion
from producer.database import open_engine
from producer.queue import StreamEntry
from producer.store import Store
from schemas.events import Event, SucceededEvent
from schemas.keys import JobState
from tests.event_kit import NOW, cancelled, completion, failed, raw_completion, retrying, started, succeeded
from tests.integration.store_kit import everything, execute, rows, save

CANARY = "c0ffee5ec2e7"
SIGNED = f"https://bucket.example/lora.safetensors?X-Amz-Credential=id&X-Amz-Signature={CANARY}"


def test_an_event_is_stored_with_its_own_bytes_even_what_this_reader_does_not_know(
    store: Store, engine: Engine
) -> None:
    body = json.loads(started().encode())
    body["data"]["from_the_future"] = 1
    payload = json.dumps(body, indent=1).encode()
    assert store.save([raw_completion(payload)]) == [True]
    [row] = rows(engine, "events")
    assert row["payload"] == payload.decode()
    assert (row["event_id"], row["job_id"], row["run"], row["type"]) == (
        "job-1:1:started:1",
        "job-1",
        1,
        "generation.started",
    )


def test_a_duplicate_changes_nothing(store: Store, engine: Engine) -> None:
    assert save(store, succeeded()) == [True]
    before = rows(engine, "jobs"), rows(engine, "images"), rows(engine, "events")
    assert save(store, succeeded(image_url="https://elsewhere.example/x.png")) == [False]
    assert (rows(engine, "jobs"), rows(engine, "images"), rows(engine, "events")) == before


def test_of_two_equal_events_in_one_batch_the_first_is_new(store: Store) -> None:
    assert save(store, started(), failed(), failed(), started()) == [True, True, False, False]


def test_a_job_nothing_is_stored_of_is_none(store: Store) -> None:
    assert store.job("job-1") is None
    assert store.image("job-1") is None


def test_a_succeeded_job_has_its_row_and_its_picture(store: Store) -> None:
    save(store, started(), succeeded())
    job, image = store.job("job-1"), store.image("job-1")
    assert job is not None
    assert image is not None
    assert (job.state, job.ended, job.run, job.attempt, job.error_code) == (JobState.SUCCEEDED, True, 1, 1, None)
    assert job.image_url == image.url == "https://images.example/images/job-1.png"
    assert job.image_key == image.key == "images/job-1.png"
    assert job.request_metadata == {"user": "ü", "big": 2**70}
    assert job.updated_at == NOW + timedelta(seconds=9)
    assert job.updated_at.utcoffset() == timedelta(0)
    assert (image.width, image.height, image.bytes) == (1024, 768, 1_234_567)
    assert (image.seed, image.steps, image.cfg, image.sha256) == (2**32 - 1, 28, 5.5, "ab" * 32)
    assert image.timings == {"queued": 1, "prepare": 2, "generate": 3, "encode": 4, "upload": 5, "total": 15}
    assert image.model_info["base_model"] == "base"
    assert (image.gpu, image.gpu_seconds) == ("H200", 1.25)


def test_a_failed_job_says_why_and_when_to_come_back(store: Store) -> None:
    save(store, failed(error="black image"))
    job = store.job("job-1")
    assert job is not None
    assert (job.state, job.error_code, job.error, job.retry_after) == (
        JobState.FAILED,
        "GENERATION_FAILED",
        "black image",
        30,
    )
    assert store.image("job-1") is None


def test_a_cancelled_job_says_so(store: Store) -> None:
    save(store, cancelled(attempt=0))
    job = store.job("job-1")
    assert job is not None
    assert (job.state, job.error_code, job.error, job.attempt) == (JobState.CANCELLED, "CANCELLED", None, 0)


@pytest.mark.parametrize("late", [started(attempt=2), retrying(attempt=3)], ids=["started", "retrying"])
def test_what_is_late_does_not_wake_an_ended_run(store: Store, late: Event) -> None:
    save(store, failed(attempt=1))
    assert save(store, late) == [True]
    job = store.job("job-1")
    assert job is not None
    assert (job.state, job.attempt) == (JobState.FAILED, 1)


def test_a_run_that_was_handed_back_and_then_cancelled_ends_though_its_attempt_was_uncounted(store: Store) -> None:
    save(store, started(attempt=1))
    save(store, cancelled(attempt=0))
    job = store.job("job-1")
    assert job is not None
    assert (job.state, job.ended, job.attempt) == (JobState.CANCELLED, True, 0)


def test_an_older_run_never_overwrites_a_newer_one(store: Store) -> None:
    save(store, started(run=2))
    save(store, failed(run=1, attempt=3), succeeded(run=1))
    job = store.job("job-1")
    assert job is not None
    assert (job.run, job.state, job.error_code, job.image_url) == (2, JobState.RUNNING, None, None)


def test_a_newer_run_starts_the_row_over(store: Store) -> None:
    save(store, failed(run=1, attempt=3))
    save(store, started(run=2))
    job = store.job("job-1")
    assert job is not None
    assert (job.run, job.state, job.attempt, job.ended) == (2, JobState.RUNNING, 1, False)
    assert (job.error_code, job.error, job.retry_after) == (None, None, None)


def test_the_picture_of_the_newest_run_is_shown_whatever_the_order(store: Store) -> None:
    save(store, succeeded(run=10, image_sha256="10" * 32))
    save(store, succeeded(run=9, image_sha256="99" * 32))
    image = store.image("job-1")
    assert image is not None
    assert (image.run, image.sha256) == (10, "10" * 32)


# A run's events, the last one furthest.
_LIFE: list[Event] = [
    started(run=1, attempt=1),
    retrying(run=1, attempt=1),
    started(run=1, attempt=2),
    failed(run=1, attempt=2),
    started(run=2, attempt=1),
    retrying(run=2, attempt=1, error="again"),
]


_names = itertools.count()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(_LIFE), again=st.lists(st.sampled_from(_LIFE)), cut=st.integers(0, 6), extra=st.booleans())
def test_in_any_order_cut_into_any_batches_the_furthest_event_wins(
    store: Store, order: list[Event], again: list[Event], cut: int, extra: bool
) -> None:
    job_id = f"any-{next(_names)}"
    stream = [_renamed(event, job_id) for event in ([*order, *again] if extra else order)]
    new = save(store, *stream[:cut]) + save(store, *stream[cut:])
    job = store.job(job_id)
    assert sum(new) == len(_LIFE)
    assert job is not None
    assert (job.run, job.state, job.attempt, job.error) == (2, JobState.DELAYED, 1, "again")


def test_every_pair_of_events_ends_alike_in_both_orders(store: Store) -> None:
    kinds = [*_LIFE, cancelled(run=1, attempt=0), succeeded(run=2)]
    for number, (first, second) in enumerate(itertools.combinations(kinds, 2)):
        if {first.id, second.id} == {"job-1:1:failed", "job-1:1:cancelled"}:
            continue  # one run has one terminal event
        ends = []
        for order in ("there", "back", "together"):
            pair = [_renamed(event, f"{order}-{number}") for event in (first, second)]
            if order == "together":
                save(store, *pair)
            else:
                for event in pair if order == "there" else reversed(pair):
                    save(store, event)
            job = store.job(f"{order}-{number}")
            assert job is not None
            ends.append((job.run, job.state, job.attempt, job.error, job.updated_at))
        assert ends[0] == ends[1] == ends[2], (first.id, second.id)


def _renamed(event: Event, job_id: str) -> Event:
    data = event.data.model_copy(update={"job_id": job_id})
    return event.model_copy(update={"id": event.id.replace("job-1", job_id), "data": data})


def test_an_undecodable_completion_is_kept_once_and_makes_no_job(store: Store, engine: Engine) -> None:
    broken = decode_completion(StreamEntry("1767323045678-3", {b"payload": b"\xff\x00{" + SIGNED.encode()}))
    assert store.save([broken, completion(started())]) == [True, True]
    assert store.save([broken]) == [False]
    [row] = [row for row in rows(engine, "events") if row["type"] == "undecodable"]
    assert (row["event_id"], row["job_id"], row["run"]) == ("undecodable:1767323045678-3", None, None)
    assert row["payload"] == "\\xff{https://bucket.example/lora.safetensors"
    assert str(row["timestamp"]).startswith("2026-01-02 03:04:05.678")
    assert len(rows(engine, "jobs")) == 1


@pytest.mark.parametrize(
    "broken",
    [
        succeeded(image_bytes=2**63),
        succeeded(gpu_seconds=float("inf")),
        started(run=10**30),
        started(job_id="x" * 3000),
        started(job_id="no/slashes"),
        started().model_copy(update={"id": ""}),
        started().model_copy(update={"id": "x" * 201}),
        started().model_copy(update={"id": "a\0b"}),
        started().model_copy(update={"timestamp": datetime.min.replace(tzinfo=UTC)}),
    ],
    ids=["bytes", "infinite", "run", "long job id", "job id", "no id", "long id", "NUL", "time"],
)
def test_what_no_database_can_hold_is_undecodable_and_stored_as_such(
    store: Store, engine: Engine, broken: Event
) -> None:
    payload = broken.encode().replace(b'"0001-01-01T00:00:00.000Z"', b'"0001-01-01T00:00:00+05:00"')
    entry = raw_completion(payload.replace(b'"gpu_seconds":null', b'"gpu_seconds":Infinity'))
    assert entry.event is None
    assert entry.problem
    assert store.save([entry]) == [True]
    assert rows(engine, "jobs") == []
    assert [row["type"] for row in rows(engine, "events")] == ["undecodable"]


def test_a_nul_in_an_error_is_left_out_of_the_column(store: Store) -> None:
    save(store, failed(error="a\0b"))
    job = store.job("job-1")
    assert job is not None
    assert job.error == "ab"


def test_a_picture_uploaded_through_a_signed_url_has_no_key(store: Store) -> None:
    event: SucceededEvent = succeeded(image_key=None)
    save(store, event)
    image = store.image("job-1")
    assert image is not None
    assert image.key is None


def test_a_batch_is_one_transaction(store: Store, engine: Engine) -> None:
    urls = {succeeded().id: "https://backend.example/hook"}
    execute(engine, "ALTER TABLE deliveries RENAME TO away")
    with pytest.raises(DBAPIError):
        save(store, started(), succeeded(), webhook_urls=urls)
    execute(engine, "ALTER TABLE away RENAME TO deliveries")
    assert not any(everything(engine).values())
    assert save(store, started(), succeeded(), webhook_urls=urls) == [True, True]


def test_a_database_error_does_not_repeat_what_was_to_be_stored(store: Store, engine: Engine) -> None:
    execute(engine, "DROP TABLE events")
    with pytest.raises(DBAPIError) as caught:
        save(store, failed(error=CANARY))
    assert CANARY not in str(caught.value)


def test_listeners_that_store_the_same_events_in_other_orders_neither_wait_for_each_other_nor_double_them(
    store: Store, database_url: str
) -> None:
    other = open_engine(database_url)
    stores = [store, Store(other)]
    events = [event for number in range(60) for event in (started(f"job-{number}"), succeeded(f"job-{number}"))]
    urls = {event.id: "https://backend.example/hook" for event in events if isinstance(event, SucceededEvent)}

    def store_all(seed: int) -> int:
        mine = random.Random(seed).sample(events, len(events))
        return sum(sum(save(stores[seed % 2], *mine[at : at + 24], webhook_urls=urls)) for at in range(0, 120, 24))

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(store_all, range(4))) == len(events)
    counts = {table: len(found) for table, found in everything(other).items()}
    other.dispose()
    assert counts == {"events": 120, "jobs": 60, "images": 60, "deliveries": 60, "disabled_endpoints": 0}


def test_listeners_that_move_the_same_jobs_do_not_wait_for_each_other_for_ever(store: Store, engine: Engine) -> None:
    job_ids = [f"job-{number}" for number in range(50)]

    def move(attempt: int) -> list[bool]:
        order = job_ids if attempt % 2 else job_ids[::-1]
        return save(store, *(started(job_id, attempt=attempt) for job_id in order))

    with ThreadPoolExecutor(4) as pool:
        assert all(map(all, pool.map(move, range(40))))
    assert {row["attempt"] for row in rows(engine, "jobs")} == {39}


def test_readers_do_not_wait_for_a_writer(store: Store, engine: Engine) -> None:
    save(store, failed())
    with engine.begin() as writer:
        writer.exec_driver_sql("DELETE FROM jobs")
        assert store.job("job-1") is not None  # what was committed


def test_no_presigned_query_reaches_the_database(store: Store, engine: Engine, tmp_path: Path) -> None:
    save(store, retrying(error=f"403 for {SIGNED}"), failed(error=f"403 for {SIGNED}"), succeeded("job-2"))
    store.save([raw_completion(b"not an event: " + SIGNED.encode())])
    kept = str(everything(engine)).encode()
    engine.dispose()
    kept += b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"https://bucket.example/lora.safetensors" in kept
    assert CANARY.encode() not in kept


def test_a_new_event_with_a_webhook_makes_one_pending_delivery_that_is_due_now(engine: Engine, store: Store) -> None:
    store = Store(engine, now=lambda: NOW)
    urls = {succeeded().id: "https://backend.example/hook"}
    assert save(store, started(), succeeded(), failed("job-2"), succeeded(), webhook_urls=urls)
    [row] = rows(engine, "deliveries")
    assert row == {
        "event_id": "job-1:1:succeeded",
        "job_id": "job-1",
        "url": "https://backend.example/hook",
        "state": "pending",
        "attempts": 0,
        "due_at": NOW,
        "status": None,
        "error": None,
        "created_at": NOW,
        "ended_at": None,
    }


def test_an_event_that_comes_again_leaves_its_delivery_as_it_has_become(engine: Engine, store: Store) -> None:
    urls = {failed().id: "https://backend.example/hook"}
    save(store, failed(), webhook_urls=urls)
    execute(engine, "UPDATE deliveries SET state = 'delivered', attempts = 3")
    assert save(store, failed(), webhook_urls={failed().id: "https://elsewhere.example/hook"}) == [False]
    [row] = rows(engine, "deliveries")
    assert (row["state"], row["attempts"], row["url"]) == ("delivered", 3, "https://backend.example/hook")


def test_an_event_that_was_stored_without_a_delivery_gets_none_later(engine: Engine, store: Store) -> None:
    save(store, failed())
    save(store, failed(), webhook_urls={failed().id: "https://backend.example/hook"})
    assert rows(engine, "deliveries") == []


def test_text_that_only_some_databases_take_is_stored_by_both(store: Store, engine: Engine) -> None:
    event = failed(error="\0\ue000 é 😀 \x7f\r\n")
    data = event.data.model_copy(update={"request_metadata": {"a\0b": ["\0", "😀", 1e300, 2**70, None]}})
    save(store, event.model_copy(update={"data": data}))
    job = store.job("job-1")
    assert job is not None
    assert job.error == "\ue000 é 😀 \x7f\r\n"
    assert list(job.request_metadata) == ["a\0b"]


def test_a_lone_surrogate_is_undecodable_and_blocks_nothing(store: Store, engine: Engine) -> None:
    broken = raw_completion(failed(error="@").encode().replace(b'"@"', b'"\\ud800"'))
    assert store.save([broken, completion(started("job-2"))]) == [True, True]
    assert {row["type"] for row in rows(engine, "events")} == {"undecodable", "generation.started"}
