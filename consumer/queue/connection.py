"""Clients for Redis. Both work in bytes: an entry that is not UTF-8 must not raise after it was delivered."""

from typing import Any

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff

_SOCKET_TIMEOUT_S = 5.0


def connect(url: str) -> Redis:
    """A client that repeats a command whose connection was lost: every script here recognises its own work."""
    retry = Retry(ExponentialWithJitterBackoff(base=0.05, cap=1.0), 3)
    return _client(url, retry=retry, socket_timeout=_SOCKET_TIMEOUT_S, health_check_interval=15)


def connect_for_blocking_reads(url: str, *, block_s: float) -> Redis:
    """A client for reads from a group: it never repeats one, since a lost reply has moved entries to us, and it waits
    longer than it blocks."""
    return _client(url, retry=Retry(NoBackoff(), 0), socket_timeout=block_s + _SOCKET_TIMEOUT_S)


def _client(url: str, *, socket_timeout: float, **options: Any) -> Redis:
    # what other programs like to have in the URL must not change these two
    fixed = {"decode_responses": False, "socket_timeout": socket_timeout}
    return Redis.from_pool(ConnectionPool(**{**options, **parse_url(url), **fixed}))


def server_time_ms(reply: tuple[int, int]) -> int:
    """Redis' TIME in milliseconds."""
    seconds, microseconds = reply
    return seconds * 1000 + microseconds // 1000
