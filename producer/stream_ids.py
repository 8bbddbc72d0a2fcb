"""Ids of stream entries: `<milliseconds of the server's clock>-<sequence number>`."""

import re
from datetime import UTC, datetime

_STREAM_ID = re.compile(r"[0-9]{1,20}-[0-9]{1,20}")
_LAST_MS = 253_402_300_799_000  # the end of the year 9999


def is_stream_id(text: str) -> bool:
    """Whether `text` names one entry of a stream."""
    return _STREAM_ID.fullmatch(text) is not None and all(int(part) < 2**64 for part in text.split("-"))


def stream_time(entry_id: str) -> datetime:
    """When an entry was added, by the server's clock; at most the end of the calendar, for ids that were made up."""
    return time_of_ms(int(entry_id.partition("-")[0]))


def time_of_ms(milliseconds: int) -> datetime:
    """An aware time in UTC, at most the end of the calendar."""
    return datetime.fromtimestamp(min(milliseconds, _LAST_MS) / 1000, UTC)
