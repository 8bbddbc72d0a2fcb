"""Surroundings of a consumer that are this machine's, or its operator's: here one process alone has others."""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, tzinfo
from functools import partial
from unittest.mock import patch

from consumer.lora.fetch import LoraFetcher
from schemas.net.http import Deadlines

CLOCK_OFFSET_S = "CHAOS_CLOCK_OFFSET_S"
NAME = "CHAOS_NAME"
FETCH_S = "CHAOS_FETCH_S"

_READ_THE_CLOCK = ("consumer.stages", "consumer.outcomes", "schemas.net.http")
_SIGN = ("botocore.auth.get_current_datetime", "botocore.compat.get_current_datetime")


@contextmanager
def surroundings(environment: Mapping[str, str]) -> Iterator[None]:
    """A wall clock that is off, a name that another consumer has too, a shorter deadline for fetching a LoRA."""
    with ExitStack() as stack:
        if offset_s := environment.get(CLOCK_OFFSET_S):
            _shift_clock(stack, float(offset_s))
        if name := environment.get(NAME):
            stack.enter_context(patch("consumer.__main__.consumer_name", return_value=name))
        if fetch_s := environment.get(FETCH_S):
            hasty = partial(LoraFetcher, deadlines=Deadlines(whole_s=float(fetch_s)))
            stack.enter_context(patch("consumer.bootstrap.LoraFetcher", hasty))
        yield


def _shift_clock(stack: ExitStack, offset_s: float) -> None:
    right = time.time

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]  # as plain as the product's own
            return datetime.fromtimestamp(right() + offset_s, tz)

    def naive_or_not(remove_tzinfo: bool = True) -> datetime:
        return Shifted.now(UTC).replace(tzinfo=None if remove_tzinfo else UTC)

    stack.enter_context(patch("time.time", lambda: right() + offset_s))
    for module in _READ_THE_CLOCK:
        stack.enter_context(patch(f"{module}.datetime", Shifted))
    for function in _SIGN:
        stack.enter_context(patch(function, naive_or_not))
