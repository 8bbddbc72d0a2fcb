"""Which dead letters a filter means, and how fast a replay goes."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from producer.dead_letters import DeadLetter, LetterFilter, Pace
from producer.letters import decode_dead_letter
from producer.queue import StreamEntry
from schemas.errors import ErrorCode
from schemas.requests import GenerationRequest
from tests.event_kit import failed

DIED_AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SECOND = timedelta(seconds=1)
URL = "https://store.example/bucket/loras/my%20fox.safetensors"


def a_letter(**fields: Any) -> DeadLetter:
    request = GenerationRequest(job_id="job-1", prompt="a fox", **fields)
    return decode_dead_letter(
        StreamEntry(
            "1-1",
            {
                b"job_id": b"job-1",
                b"run": b"1",
                b"payload": request.encode(),
                b"event": failed(error="The picture is BLACK").encode(),
                b"died_at": str(int(DIED_AT.timestamp() * 1000)).encode(),
            },
        )
    )


def test_a_letter_without_a_time_died_when_it_was_added() -> None:
    letter = decode_dead_letter(StreamEntry("1767323045678-0", {}))
    assert letter.died_at == datetime(2026, 1, 2, 3, 4, 5, 678_000, UTC)
    assert decode_dead_letter(StreamEntry("18446744073709551615-0", {})).died_at.year == 9999


@pytest.mark.parametrize(
    ("where", "fits"),
    [
        (LetterFilter(), True),
        (LetterFilter(error_codes=[ErrorCode.TIMEOUT, ErrorCode.GENERATION_FAILED]), True),
        (LetterFilter(error_codes=[ErrorCode.TIMEOUT]), False),
        (LetterFilter(died_before=DIED_AT + SECOND), True),
        (LetterFilter(died_before=DIED_AT), False),
        (LetterFilter(died_after=DIED_AT - SECOND), True),
        (LetterFilter(died_after=DIED_AT), False),
        (LetterFilter(tenant="acme"), True),
        (LetterFilter(tenant="acm"), False),
        (LetterFilter(job_id="job-1"), True),
        (LetterFilter(job_id="job"), False),
        (LetterFilter(text="is black"), True),
        (LetterFilter(text="white"), False),
        (LetterFilter(text="black", tenant="acme"), True),
        (LetterFilter(text="black", tenant="other"), False),
    ],
)
def test_a_letter_has_to_fit_all_that_a_filter_says(where: LetterFilter, fits: bool) -> None:
    assert where.fits(a_letter(tenant="acme")) is fits


@pytest.mark.parametrize(
    ("fields", "part", "fits"),
    [
        ({"lora_url": URL}, "loras/my%20fox", True),
        ({"lora_url": URL}, "loras/my fox.safetensors", True),
        ({"lora_url": URL}, "LORAS", False),
        ({"lora_key": "loras/ann.safetensors"}, "loras/ann.safetensors", True),
        ({"lora_key": "loras/ann.safetensors"}, "loras/anna", False),
        ({"loras": [{"key": "a.safetensors"}, {"url": URL}]}, "fox", True),
        ({"loras": [{"key": "a.safetensors"}, {"url": URL}]}, "bear", False),
        ({}, "a", False),
    ],
)
def test_a_lora_is_found_by_part_of_its_key_or_url(fields: dict[str, Any], part: str, fits: bool) -> None:
    assert LetterFilter(lora=part).fits(a_letter(**fields)) is fits


def test_a_letter_that_cannot_be_read_fits_nothing_that_asks_for_what_it_said() -> None:
    letter = decode_dead_letter(StreamEntry("1767323045000-0", {b"raw": b"\xff"}))
    for where in (LetterFilter(tenant="a"), LetterFilter(lora="a"), LetterFilter(text="a"), LetterFilter(job_id="a")):
        assert not where.fits(letter)
    assert not LetterFilter(error_codes=[ErrorCode.INTERNAL]).fits(letter)
    assert LetterFilter(died_before=DIED_AT + SECOND).fits(letter)


@pytest.mark.parametrize("fields", [{"tenant": ""}, {"lora": ""}, {"text": ""}, {"job_id": ""}])
def test_a_filter_with_nothing_in_it_is_refused_since_it_would_mean_everything(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is empty"):
        LetterFilter(**fields)


@pytest.mark.parametrize("name", ["died_before", "died_after"])
def test_a_time_without_a_zone_is_refused(name: str) -> None:
    options: dict[str, Any] = {name: DIED_AT.replace(tzinfo=None)}
    with pytest.raises(ValueError, match=f"{name} has no time zone"):
        LetterFilter(**options)


class FakeTime:
    def __init__(self) -> None:
        self.now_s = 100.0
        self.slept_s: list[float] = []

    def clock(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.now_s += seconds


async def test_jobs_keep_their_distance_and_lost_time_is_not_made_up_for() -> None:
    time = FakeTime()
    pace = Pace(4, clock=time.clock, sleep=time.sleep)
    assert await pace.turn()
    pace.went()
    time.now_s += 0.05
    assert await pace.turn()
    pace.went()
    time.now_s += 10
    for _ in range(2):
        assert await pace.turn()
        pace.went()
    assert time.slept_s == [pytest.approx(0.2), pytest.approx(0.25)]


async def test_a_letter_that_made_no_job_costs_no_time() -> None:
    time = FakeTime()
    pace = Pace(1, clock=time.clock, sleep=time.sleep)
    assert [await pace.turn() for _ in range(3)] == [True] * 3
    assert time.slept_s == []


async def test_a_pace_without_a_rate_never_waits() -> None:
    time = FakeTime()
    pace = Pace(clock=time.clock, sleep=time.sleep)
    pace.went()
    assert await pace.turn()
    assert time.slept_s == []


async def test_a_stop_ends_the_wait_for_the_next_turn() -> None:
    stop = asyncio.Event()
    pace = Pace(1e-6, stop=stop)
    assert await pace.turn()
    pace.went()
    waiting = asyncio.create_task(pace.turn())
    await asyncio.sleep(0)
    stop.set()
    assert await asyncio.wait_for(waiting, 10) is False


async def test_the_wait_for_a_turn_ends_by_itself() -> None:
    pace = Pace(100)
    pace.went()
    assert await asyncio.wait_for(pace.turn(), 10)


@pytest.mark.parametrize("rate", [0, -1.0, float("nan")])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Pace(rate)
