"""The Redis server: its version and settings, and what they mean for the jobs in it."""

import asyncio
import time
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from producer.doctor.findings import Finding, Verdict, told

_AREA = "redis"
_OLDEST = (6, 2)
_REACH_S = 6.0
_WARN_USED, _FAIL_USED = 0.8, 0.95
_WARN_SKEW_S, _FAIL_SKEW_S = 2.0, 60.0
_LOOPBACK = ("localhost", "127.0.0.1", "::1", None)

Info = Mapping[str, Any]


async def check_reach(redis: Redis, url: str) -> list[Finding]:
    """Whether it answers, and whether on the way anybody could listen."""
    parts = urlsplit(url)
    place = parts.path if parts.scheme == "unix" else parts.hostname or "localhost"
    place += f":{parts.port}" if parts.port else ""
    try:
        async with asyncio.timeout(_REACH_S):
            await redis.ping()
    except (RedisError, TimeoutError) as error:
        hint = "Look at REDIS_URL, the password in it, and the network."
        return [Finding(_AREA, "reach", Verdict.FAIL, f"{place}: {told(error)}", hint, out_of_reach=True)]
    if parts.scheme == "rediss":
        return [Finding(_AREA, "reach", Verdict.OK, f"{place} answers, over TLS")]
    if parts.scheme == "unix" or parts.hostname in _LOOPBACK:
        return [Finding(_AREA, "reach", Verdict.OK, f"{place} answers")]
    hint = "Use rediss:// unless the network between is your own."
    return [Finding(_AREA, "reach", Verdict.WARN, f"{place} answers, without TLS", hint)]


async def check_clock(redis: Redis) -> list[Finding]:
    """How far this host's clock is from the server's."""
    before_s = time.time()
    seconds, microseconds = await redis.time()
    skew_s = seconds + microseconds / 1e6 - (before_s + time.time()) / 2
    verdict = _by_size(abs(skew_s), _WARN_SKEW_S, _FAIL_SKEW_S)
    found = f"{abs(skew_s):.1f} s apart" if verdict is not Verdict.OK else "agrees with this host's"
    return [_finding("clock", verdict, found, "Set the clocks by NTP: expires_at and presigned URLs depend on them.")]


async def check_settings(redis: Redis) -> list[Finding]:
    """Version, eviction, memory, persistence and topology, as far as the server tells."""
    info: Info = await _ask(redis.info()) or {}
    config: Mapping[str, str] = await _ask(redis.config_get("appendfsync")) or {}
    return [*judge(info, config.get("appendfsync"))]


def judge(info: Info, appendfsync: str | None) -> Iterable[Finding]:
    """What INFO, which may lack anything, and `appendfsync` mean."""
    yield _version(info)
    yield _eviction(info)
    yield _memory(info)
    yield _persistence(info, appendfsync)
    yield from _topology(info)


def _version(info: Info) -> Finding:
    version = info.get("redis_version")
    if version is None:
        return _untold("version")
    numbers = tuple(int(part) for part in str(version).split(".")[:2] if part.isdigit())
    if numbers < _OLDEST:
        return _finding("version", Verdict.FAIL, f"{version}", "Redis 6.2 or newer is needed.")
    return _finding("version", Verdict.OK, f"{version}")


def _eviction(info: Info) -> Finding:
    policy = info.get("maxmemory_policy")
    if policy is None:
        return _untold("maxmemory-policy")
    if policy == "noeviction":
        return _finding("maxmemory-policy", Verdict.OK, policy)
    hint = "Set maxmemory-policy noeviction: an evicted key is a lost job."
    verdict = Verdict.FAIL if str(policy).startswith("allkeys") else Verdict.WARN
    return _finding("maxmemory-policy", verdict, f"{policy}", hint)


def _memory(info: Info) -> Finding:
    used, limit = info.get("used_memory"), info.get("maxmemory")
    if used is None or limit is None:
        return _untold("memory")
    if not limit:
        return _finding("memory", Verdict.OK, f"{used / 1e6:.1f} MB used, no limit set")
    verdict = _by_size(used / limit, _WARN_USED, _FAIL_USED)
    found = f"{used / 1e6:.1f} MB used of {limit / 1e6:.1f} MB"
    return _finding("memory", verdict, found, "Give it more, or find what grows: at the limit jobs are refused.")


def _persistence(info: Info, appendfsync: str | None) -> Finding:
    enabled = info.get("aof_enabled")
    if enabled is None:
        return _untold("persistence")
    if not enabled:
        found = "no AOF: a crash loses everything since the last snapshot"
        return _finding("persistence", Verdict.WARN, found, "Set appendonly yes.")
    if info.get("aof_last_write_status", "ok") != "ok":
        return _finding("persistence", Verdict.FAIL, "AOF, but its last write failed", "Look at the server's disk.")
    loss = {
        "always": "AOF, appendfsync always: nothing that was acknowledged is lost",
        "everysec": "AOF, appendfsync everysec: a crash loses up to about a second",
        "no": "AOF, appendfsync no: a crash of the host loses what its kernel had not written",
    }
    found = loss.get(appendfsync or "", "AOF; appendfsync is not told")
    verdict = Verdict.WARN if appendfsync == "no" else Verdict.OK
    return _finding("persistence", verdict, found, "Set appendfsync everysec or always.")


def _topology(info: Info) -> Iterable[Finding]:
    if info.get("role") == "slave":
        hint = "Let REDIS_URL name the primary, or a name that follows it."
        yield _finding("role", Verdict.FAIL, "a replica: it takes no jobs", hint)
    if info.get("cluster_enabled"):
        hint = "All keys share one slot, and this client follows no redirects: REDIS_URL must name that slot's node."
        yield _finding("cluster", Verdict.WARN, "cluster mode is on", hint)


def _by_size(size: float, warn: float, fail: float) -> Verdict:
    return Verdict.OK if size < warn else Verdict.WARN if size < fail else Verdict.FAIL


def _finding(check: str, verdict: Verdict, found: str, hint: str | None = None) -> Finding:
    return Finding(_AREA, check, verdict, found, None if verdict is Verdict.OK else hint)


def _untold(check: str) -> Finding:
    return Finding(_AREA, check, Verdict.SKIPPED, "the server does not tell", "Ask whoever runs it.")


async def _ask(reply: Any) -> Any:
    """The reply; None where the server forbids the command, or has none of that name."""
    try:
        return await reply
    except ResponseError:
        return None
