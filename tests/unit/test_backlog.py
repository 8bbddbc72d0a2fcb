import pytest

from producer.backlog import missing_consumers


@pytest.mark.parametrize(
    ("waiting", "in_flight", "missing"),
    [
        (0, 0, 0),
        (0, 3, 0),
        (1, 0, 1),
        (30, 0, 1),
        (31, 0, 2),
        (31, 1, 1),
        (31, 5, 0),
        (10_000, 0, 4),
        (10_000, 4, 0),
    ],
)
def test_there_is_one_consumer_for_every_so_many_jobs_up_to_the_cap(waiting: int, in_flight: int, missing: int) -> None:
    assert missing_consumers(waiting, in_flight, jobs_per_consumer=30, max_consumers=4) == missing
