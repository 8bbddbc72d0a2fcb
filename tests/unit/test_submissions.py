"""When a submission that found no room is to come back."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.settings import ProducerSettings
from producer.submissions import QueueLimits, Submitted, ends_per_s, seconds_until_room, submitted

LIMITS = QueueLimits(queue=100, per_tenant=20, completions=1000)


@pytest.mark.parametrize(
    ("held", "limit", "rate_per_s", "seconds"),
    [
        (1000, 1000, 0.5, 100),  # 50 over 95 %, one every 2 s
        (1040, 1000, 0.5, 180),  # a bare XADD goes beyond the limit
        (10, 10, 0.5, 2),  # 95 % of 10 is 9.5: one place
        (1, 1, 0.01, 100),
        (1000, 1000, 0.3, 167),  # rounded up
        (1000, 1000, 1000.0, 1),
        (10_000, 10_000, 0.001, 3600),
        (1000, 1000, None, 30),
    ],
    ids=["95 %", "beyond", "small", "one", "rounded", "quick", "slow", "unmeasured"],
)
def test_the_queue_has_drained_to_95_percent_by_then(
    held: int, limit: int, rate_per_s: float | None, seconds: int
) -> None:
    assert seconds_until_room(held, limit, rate_per_s) == seconds


@given(st.integers(1, 10**6), st.integers(0, 10**6), st.none() | st.floats(1e-9, 1e9))
def test_it_is_always_between_a_second_and_an_hour(limit: int, beyond: int, rate_per_s: float | None) -> None:
    assert 1 <= seconds_until_room(limit + beyond, limit, rate_per_s) <= 3600


@pytest.mark.parametrize(
    ("ends", "since_s", "rate"),
    [(0, 0.0, None), (1, 5.0, None), (2, 10.0, 0.1), (100, 198.0, 0.5), (3, 0.0, 2.0), (3, -5.0, 2.0)],
    ids=["none", "one", "two", "a hundred", "at once", "a clock that went back"],
)
def test_the_rate_is_that_of_the_ends_since_the_first_of_them(ends: int, since_s: float, rate: float | None) -> None:
    assert ends_per_s(ends, since_s) == rate


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ([b"accepted", 1, b"queued"], Submitted("accepted", 1, "queued")),
        ([b"full", 100, b"", 100, 11, 10_000], Submitted("full", 100, "", retry_after=5)),
        # one end a second, of which a fifth is the tenant's
        ([b"tenant_full", 20, b"", 100, 11, 10_000], Submitted("tenant_full", 20, "", retry_after=5)),
        ([b"tenant_full", 20, b"", 20, 11, 10_000], Submitted("tenant_full", 20, "", retry_after=1)),
        ([b"tenant_full", 20, b"", 0, 11, 10_000], Submitted("tenant_full", 20, "", retry_after=1)),
        ([b"tenant_full", 20, b"", 100, 1, 10_000], Submitted("tenant_full", 20, "", retry_after=30)),
        ([b"unheard", 1000, b"audit", 3, 0, 0], Submitted("unheard", 1000, "", "audit", 60)),
        ([b"unheard", 1000, b"", 3, 0, 0], Submitted("unheard", 1000, "")),
    ],
    ids=["accepted", "full", "a fifth", "all the tenant's", "none waits", "unmeasured", "unheard", "nobody listens"],
)
def test_a_reply_is_read_with_the_limits_in_force(reply: list[Any], answer: Submitted) -> None:
    assert submitted(reply, LIMITS) == answer


def test_the_limits_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SDXL_MAX_QUEUE", "SDXL_MAX_QUEUE_PER_TENANT", "SDXL_MAX_COMPLETIONS"):
        monkeypatch.delenv(name, raising=False)
    assert ProducerSettings().limits == QueueLimits(10_000, 0, 100_000)
    monkeypatch.setenv("SDXL_MAX_QUEUE_PER_TENANT", "5")
    monkeypatch.setenv("SDXL_MAX_COMPLETIONS", "0")
    assert ProducerSettings().limits == QueueLimits(10_000, 5, 0)
