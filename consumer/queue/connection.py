"""Clients for Redis. Both work in bytes: an entry that is not UTF-8 must not raise after it was delivered."""

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff

_SOCKET_TIMEOUT_S = 5.0


def connect(url: str) -> Redis:
    """A client that repeats a command whose connection was lost: every script here recognises its own work."""
    retry = Retry(ExponentialWithJitterBackoff(base=0.05, cap=1.0), 3)
    return Redis.from_url(url, retry=retry, socket_timeout=_SOCKET_TIMEOUT_S, health_check_interval=15)


def connect_for_blocking_reads(url: str, *, block_s: float) -> Redis:
    """A client for reads from a group: it never repeats one, since a lost reply has moved entries to us, and it waits
    longer than it blocks."""
    return Redis.from_url(url, retry=Retry(NoBackoff(), 0), socket_timeout=block_s + _SOCKET_TIMEOUT_S)


def server_time_ms(reply: tuple[int, int]) -> int:
    """Redis' TIME in milliseconds."""
    seconds, microseconds = reply
    return seconds * 1000 + microseconds // 1000
