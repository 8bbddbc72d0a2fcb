"""All checks, each apart from the others."""

import asyncio
from functools import partial

from redis.asyncio import Redis

from producer.doctor import backend, queue, redis_server, storage
from producer.doctor.findings import Check, Finding, Verdict, isolated
from producer.queue import ProducerQueue, connect
from producer.settings import ProducerSettings
from schemas.keys import Keys

_DEADLINE_S = 10.0
_STORAGE_DEADLINE_S = 60.0


async def examine(settings: ProducerSettings) -> list[Finding]:
    """Looks at everything. What is broken, away or forbidden is a finding, and raises nothing.

    Leaves nothing behind but, where the storage refuses to delete it, one small object under `doctor/`.
    """
    apart = partial(isolated, deadline_s=_DEADLINE_S)
    groups = await asyncio.gather(
        _examine_redis(settings),
        isolated("storage", "bucket", partial(storage.check_storage, settings), deadline_s=_STORAGE_DEADLINE_S),
        apart("database", "reach", partial(backend.check_database, settings)),
        apart("webhooks", "secret", partial(backend.check_webhook_secret, settings)),
        apart("gateway", "bearer", partial(backend.check_token, settings)),
    )
    return [finding for group in groups for finding in group]


async def _examine_redis(settings: ProducerSettings) -> list[Finding]:
    url = settings.redis_url.get_secret_value()
    try:
        redis = connect(url)
    except ValueError as error:
        return [Finding("redis", "reach", Verdict.FAIL, f"REDIS_URL: {error}", out_of_reach=True)]
    try:
        findings = await isolated(
            "redis", "reach", partial(redis_server.check_reach, redis, url), deadline_s=_DEADLINE_S
        )
        if any(finding.out_of_reach for finding in findings):
            return [*findings, Finding("redis", "all else", Verdict.SKIPPED, "Redis is out of reach")]
        for area, name, check in _redis_checks(redis, settings):
            findings += await isolated(area, name, check, deadline_s=_DEADLINE_S)
    finally:
        await redis.aclose()
    return findings


def _redis_checks(redis: Redis, settings: ProducerSettings) -> list[tuple[str, str, Check]]:
    keys = Keys(settings.prefix)
    jobs = ProducerQueue(redis, keys, limits=settings.limits, job_ttl_s=settings.job_ttl_s)
    return [
        ("redis", "settings", partial(redis_server.check_settings, redis)),
        ("redis", "clock", partial(redis_server.check_clock, redis)),
        ("queue", "request groups", partial(queue.check_request_groups, redis, keys)),
        ("queue", "listeners", partial(queue.check_completions, redis, keys)),
        ("queue", "work", partial(queue.check_work, jobs, settings)),
        ("webhooks", "workers", partial(backend.check_webhook_workers, settings)),
    ]
