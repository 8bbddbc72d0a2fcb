"""What a submission is told: that it was taken, or which limit keeps it out and when there may be room."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

_DRAINED = 0.95
_UNMEASURED_S = 30
_UNHEARD_S = 60
_MIN_S, _MAX_S = 1, 3600
_MIN_SPAN_S = 1.0


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How many jobs may wait, how many runs of one tenant may be unfinished, how many events may be kept; 0: any."""

    queue: int
    per_tenant: int = 0
    completions: int = 0


class Submitted(NamedTuple):
    """Answer of SUBMIT and REPLAY.

    `verdict`: accepted, same, conflict, refused, full, tenant_full, unheard; of a replay gone, too. `run` is the run's
    number, or what the limit has counted. Where events are unheard, `group` is the listener group that is furthest
    behind, "" if there is none. `retry_after` is in seconds, None where waiting does not help.
    """

    verdict: str
    run: int
    state: str
    group: str = ""
    retry_after: int | None = None


def submitted(reply: Any, limits: QueueLimits) -> Submitted:
    """Reads the reply of SUBMIT or REPLAY."""
    verdict, count, text, *measured = reply
    answer = Submitted(verdict.decode(), int(count), text.decode())
    if not measured:
        return answer
    waiting, ends, since_ms = map(int, measured)
    rate = ends_per_s(ends, since_ms / 1000)
    match answer.verdict:
        case "full":
            retry_after = seconds_until_room(answer.run, limits.queue, rate)
        case "tenant_full":  # of the runs that end, as many are the tenant's as of those that wait
            share = min(1.0, answer.run / waiting) if waiting else 1.0
            retry_after = seconds_until_room(answer.run, limits.per_tenant, rate and rate * share)
        case _:
            return answer._replace(state="", group=answer.state, retry_after=_UNHEARD_S if answer.state else None)
    return answer._replace(state="", group=answer.state, retry_after=retry_after)


def ends_per_s(ends: int, since_s: float) -> float | None:
    """Runs that end per second, where the first of `ends` did `since_s` ago; None for fewer than two."""
    return (ends - 1) / max(since_s, _MIN_SPAN_S) if ends > 1 else None


def seconds_until_room(held: int, limit: int, rate_per_s: float | None) -> int:
    """When to come back: 95 % of the limit are left by then, and one place at least is free. From 1 to 3600 s.

    30 s where there is no rate.
    """
    if rate_per_s is None:
        return _UNMEASURED_S
    over = held - math.floor(_DRAINED * limit)  # one at least, since floor(0.95 n) < n
    return min(_MAX_S, max(_MIN_S, math.ceil(over / rate_per_s)))
