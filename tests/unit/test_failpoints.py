"""Failpoints: off unless armed, once each, at the arrival that was asked for."""

from collections.abc import Iterator

import pytest

from consumer import failpoints


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


def test_nothing_is_armed_by_itself() -> None:
    with failpoints.around("upload"):
        pass


def test_a_failpoint_acts_at_the_arrival_that_it_names_and_only_then() -> None:
    failpoints.arm("upload.before=fail@2")
    with failpoints.around("upload"):
        pass
    with pytest.raises(RuntimeError, match=r"failpoint upload\.before"), failpoints.around("upload"):
        pass
    with failpoints.around("upload"):
        pass


def test_after_a_step_means_that_it_has_succeeded() -> None:
    failpoints.arm("upload.after=memory")
    with pytest.raises(ZeroDivisionError), failpoints.around("upload"):
        raise ZeroDivisionError
    with pytest.raises(MemoryError), failpoints.around("upload"):
        pass


@pytest.mark.parametrize("text", ["upload=kill", "upload.before=explode", "upload.before=kill@0", "x.before=kill;rm"])
def test_what_cannot_be_read_arms_nothing(text: str) -> None:
    with pytest.raises(ValueError, match=r"place=action"):
        failpoints.arm(f"download.before=fail,{text}")
    with failpoints.around("download"):
        pass
