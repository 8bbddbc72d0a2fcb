"""Living through a Redis that is away: a step of the protocol is repeated until it is answered."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import (
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

T = TypeVar("T")
log = structlog.get_logger(__name__)

_BACKOFF = ExponentialWithJitterBackoff(base=0.1, cap=2.0)
_BACKOFF_STEPS = 16  # it reaches its cap before, and overflows far behind
_PASSING_REFUSALS = (ReadOnlyError, OutOfMemoryError, NoPermissionError, NoScriptError)
# Redis 6.2 wraps what a command in a script answers, so that only its text tells.
_PASSING_TEXTS = (
    *("READONLY", "OOM", "NOREPLICAS", "MISCONF", "NOPERM", "LOADING", "BUSY ", "MASTERDOWN", "CLUSTERDOWN"),
    *("The user executing the script can't", "ACL failure in script"),  # NOPERM in a script, as 6.2 and 7 word it
)


def is_passing(error: RedisError) -> bool:
    """Whether the same command can succeed later: Redis is away, loading, read-only, full, being reconfigured, or
    has forgotten a script between its loading and its call."""
    if not isinstance(error, ResponseError) or isinstance(error, _PASSING_REFUSALS):
        return True
    return any(text in str(error) for text in _PASSING_TEXTS)


async def until_answered(step: Callable[[], Awaitable[T]], *, what: str) -> T:
    """Awaits `step()`, again and again while Redis is out of reach.

    There is no limit: a result that is made is worth keeping, and if the lease is lost meanwhile the answer says so.
    Raises the RedisError that repeating cannot cure.
    """
    failures = 0
    while True:
        try:
            return await step()
        except RedisError as error:
            if not is_passing(error):
                raise
            failures += 1
            delay_s = _BACKOFF.compute(min(failures, _BACKOFF_STEPS))
            log.warning("redis.out_of_reach", step=what, error=type(error).__name__, failures=failures)
            await asyncio.sleep(delay_s)
