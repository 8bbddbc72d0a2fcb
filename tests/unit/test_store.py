"""The listener's tables on SQLite: each event once, jobs that only move forward, nothing secret."""

import itertools
import json
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import make_url
from sqlalchemy.exc import OperationalError
from sqlalchemy.schema import CreateTable

from producer.completions import decode_completion
from producer.queue import StreamEntry
from producer.store import DatabaseRefused, Store
from producer.tables import METADATA
from schemas.events import Event, SucceededEvent
from schemas.keys import JobState
from tests.event_kit import NOW, cancelled, completion, failed, raw_completion, retrying, started, succeeded

CANARY = "c0ffee5ec2e7"
QUERIES = {
    "events": "SELECT * FROM events ORDER BY 1",
    "jobs": "SELECT * FROM jobs ORDER BY 1",
    "images": "SELECT * FROM images ORDER BY 1",
}
SIGNED = f"https://bucket.example/lora.safetensors?X-Amz-Credential=id&X-Amz-Signature={CANARY}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def store(file: Path) -> Iterator[Store]:
    opened = open_store(file)
    yield opened
    opened.close()


def open_store(file: Path) -> Store:
    opened = Store(f"sqlite:///{file}")
    opened.create_tables()
    return opened


def save(store: Store, *events: Event) -> list[bool]:
    return store.save([completion(event) for event in events])


def rows(file: Path, table: str) -> list[dict[str, object]]:
    connection = sqlite3.connect(file)
    connection.row_factory = sqlite3.Row
    found = [dict(row) for row in connection.execute(QUERIES[table])]
    connection.close()
    return found


def test_an_event_is_stored_with_its_own_bytes_even_what_this_reader_does_not_know(store: Store, file: Path) -> None:
    body = json.loads(started().encode())
    body["data"]["from_the_future"] = 1
    payload = json.dumps(body, indent=1).encode()
    assert store.save([raw_completion(payload)]) == [True]
    [row] = rows(file, "events")
    assert row["payload"] == payload.decode()
    assert (row["event_id"], row["job_id"], row["run"], row["type"]) == (
        "job-1:1:started:1",
        "job-1",
        1,
        "generation.started",
    )


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (f"mysql://u:{CANARY}@host/x", "neither SQLite nor PostgreSQL"),
        (f"mysql+nosuch://u:{CANARY}@host/x", "neither SQLite nor PostgreSQL"),
        (f"{CANARY}://host/x", "neither SQLite nor PostgreSQL"),
        (f"postgresql+{CANARY}://host/x", "not the URL of a database"),
        (f"postgresql://host:{CANARY}/x", "not the URL of a database"),
        (f"sqlite:///x.db?timeout={CANARY}", "not the URL of a database"),
        (f"sqlite:///x.db?timeout={CANARY}&timeout=2", "not the URL of a database"),
        (CANARY, "not the URL of a database"),
        ("postgresql+pg8000://host/x", "its driver is not installed: pg8000"),
    ],
)
def test_a_database_that_cannot_serve_is_refused_before_anything_is_stored(url: str, said: str) -> None:
    with pytest.raises(DatabaseRefused) as caught:
        Store(url)
    assert str(caught.value) == said


def test_a_duplicate_changes_nothing(store: Store, file: Path) -> None:
    assert save(store, succeeded()) == [True]
    before = rows(file, "jobs"), rows(file, "images"), rows(file, "events")
    assert save(store, succeeded(image_url="https://elsewhere.example/x.png")) == [False]
    assert (rows(file, "jobs"), rows(file, "images"), rows(file, "events")) == before


def test_of_two_equal_events_in_one_batch_the_first_is_new(store: Store) -> None:
    assert save(store, started(), failed(), failed(), started()) == [True, True, False, False]


def test_an_empty_batch_touches_no_database(tmp_path: Path) -> None:
    assert Store(f"sqlite:///{tmp_path}/missing/store.db").save([]) == []


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


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(_LIFE), again=st.lists(st.sampled_from(_LIFE)), cut=st.integers(0, 6), extra=st.booleans())
def test_in_any_order_cut_into_any_batches_the_furthest_event_wins(
    tmp_path_factory: pytest.TempPathFactory, order: list[Event], again: list[Event], cut: int, extra: bool
) -> None:
    opened = open_store(tmp_path_factory.mktemp("store") / "store.db")
    stream = [*order, *again] if extra else order
    new = save(opened, *stream[:cut]) + save(opened, *stream[cut:])
    job = opened.job("job-1")
    opened.close()
    assert sum(new) == len(_LIFE)
    assert job is not None
    assert (job.run, job.state, job.attempt, job.error) == (2, JobState.DELAYED, 1, "again")


def test_every_pair_of_events_ends_alike_in_both_orders(file: Path, store: Store) -> None:
    kinds = [*_LIFE, cancelled(run=1, attempt=0), succeeded(run=2)]
    for number, (first, second) in enumerate(itertools.combinations(kinds, 2)):
        if {first.id, second.id} == {"job-1:1:failed", "job-1:1:cancelled"}:
            continue  # one run has one terminal event
        ends = []
        for order in ("there", "back"):
            pair = [_renamed(event, f"{order}-{number}") for event in (first, second)]
            for event in pair if order == "there" else reversed(pair):
                save(store, event)
            job = store.job(f"{order}-{number}")
            assert job is not None
            ends.append((job.run, job.state, job.attempt, job.error, job.updated_at))
        assert ends[0] == ends[1], (first.id, second.id)


def _renamed(event: Event, job_id: str) -> Event:
    data = event.data.model_copy(update={"job_id": job_id})
    return event.model_copy(update={"id": event.id.replace("job-1", job_id), "data": data})


def test_a_batch_is_one_transaction(store: Store, file: Path) -> None:
    connection = sqlite3.connect(file)
    connection.execute("DROP TABLE images")
    connection.close()
    with pytest.raises(OperationalError):
        save(store, started(), succeeded())
    assert rows(file, "events") == []
    assert rows(file, "jobs") == []
    store.create_tables()
    assert save(store, started(), succeeded()) == [True, True]


def test_two_listeners_write_one_file_without_a_lock_error(file: Path, store: Store) -> None:
    other = open_store(file)
    batches = [[completion(failed(f"job-{i}-{j}")) for j in range(10)] for i in range(20)]
    with ThreadPoolExecutor(4) as pool:
        new = [*pool.map(store.save, batches), *pool.map(other.save, batches)]
    other.close()
    assert sum(map(sum, new)) == 200
    assert len(rows(file, "jobs")) == 200


def test_many_listeners_may_start_on_an_empty_database_at_once(file: Path) -> None:
    for _ in range(5):
        with ThreadPoolExecutor(8) as pool:
            opened = list(pool.map(open_store, [file] * 8))
        assert rows(file, "jobs") == []
        for store in opened:
            store.close()
        file.unlink()


def test_readers_do_not_wait_for_a_writer(file: Path, store: Store) -> None:
    save(store, failed())
    writer = sqlite3.connect(file)
    writer.execute("BEGIN EXCLUSIVE")
    writer.execute("DELETE FROM jobs")
    assert store.job("job-1") is not None  # what was committed, from the write-ahead log
    writer.close()


def test_an_undecodable_completion_is_kept_once_and_makes_no_job(store: Store, file: Path) -> None:
    broken = decode_completion(StreamEntry("1767323045678-3", {b"payload": b"\xff\x00{" + SIGNED.encode()}))
    assert store.save([broken, completion(started())]) == [True, True]
    assert store.save([broken]) == [False]
    [row] = [row for row in rows(file, "events") if row["type"] == "undecodable"]
    assert (row["event_id"], row["job_id"], row["run"]) == ("undecodable:1767323045678-3", None, None)
    assert row["payload"] == "\\xff{https://bucket.example/lora.safetensors"
    assert str(row["timestamp"]).startswith("2026-01-02 03:04:05.678")
    assert len(rows(file, "jobs")) == 1


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
        started().model_copy(update={"timestamp": datetime.min.replace(tzinfo=UTC)}),
    ],
    ids=["bytes", "infinite", "run", "long job id", "job id", "no id", "long id", "time"],
)
def test_what_no_database_can_hold_is_undecodable_and_stored_as_such(store: Store, file: Path, broken: Event) -> None:
    payload = broken.encode().replace(b'"0001-01-01T00:00:00.000Z"', b'"0001-01-01T00:00:00+05:00"')
    entry = raw_completion(payload.replace(b'"gpu_seconds":null', b'"gpu_seconds":Infinity'))
    assert entry.event is None
    assert entry.problem
    assert store.save([entry]) == [True]
    assert rows(file, "jobs") == []
    assert [row["type"] for row in rows(file, "events")] == ["undecodable"]


def test_a_nul_in_an_error_is_left_out_of_the_column(store: Store) -> None:
    save(store, failed(error="a\0b"))
    job = store.job("job-1")
    assert job is not None
    assert job.error == "ab"


def test_no_presigned_query_reaches_the_file(file: Path) -> None:
    store = open_store(file)
    save(store, retrying(error=f"403 for {SIGNED}"), failed(error=f"403 for {SIGNED}"), succeeded("job-2"))
    store.save([raw_completion(b"not an event: " + SIGNED.encode())])
    store.close()
    kept = b"".join(path.read_bytes() for path in file.parent.iterdir())
    assert b"https://bucket.example/lora.safetensors" in kept
    assert CANARY.encode() not in kept


def test_a_database_error_does_not_repeat_what_was_to_be_stored(store: Store, file: Path) -> None:
    connection = sqlite3.connect(file)
    connection.execute("DROP TABLE events")
    connection.close()
    with pytest.raises(OperationalError) as caught:
        save(store, failed(error=CANARY))
    assert CANARY not in str(caught.value)


def test_the_tables_and_statements_exist_in_postgresql_too(store: Store) -> None:
    dialect = make_url("postgresql://").get_dialect()()
    ddl = "".join(str(CreateTable(table).compile(dialect=dialect)) for table in METADATA.sorted_tables)
    assert "TIMESTAMP WITH TIME ZONE" in ddl
    assert "DOUBLE PRECISION" in ddl


def test_a_picture_uploaded_through_a_signed_url_has_no_key(store: Store) -> None:
    event: SucceededEvent = succeeded(image_key=None)
    save(store, event)
    image = store.image("job-1")
    assert image is not None
    assert image.key is None
