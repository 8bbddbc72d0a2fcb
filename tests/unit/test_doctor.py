"""Findings without a server: what Redis says of itself, settings, and checks that break."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import NoPermissionError
from sqlalchemy.exc import OperationalError

from producer.doctor import backend, queue
from producer.doctor.findings import Finding, Verdict, isolated, told
from producer.doctor.redis_server import check_clock, check_reach, judge
from producer.settings import ProducerSettings

HEALTHY: dict[str, Any] = {
    "redis_version": "7.4.1",
    "maxmemory_policy": "noeviction",
    "used_memory": 1_000_000,
    "maxmemory": 100_000_000,
    "aof_enabled": 1,
    "aof_last_write_status": "ok",
    "role": "master",
    "cluster_enabled": 0,
}
CANARY = "canary-of-doctor"


def judged(appendfsync: str | None = "always", **changes: Any) -> dict[str, Finding]:
    return {finding.check: finding for finding in judge(HEALTHY | changes, appendfsync)}


def test_a_healthy_redis_gives_no_hint() -> None:
    assert {(finding.verdict, finding.hint) for finding in judged().values()} == {(Verdict.OK, None)}


@pytest.mark.parametrize(
    ("changes", "check", "verdict"),
    [
        ({"redis_version": "6.0.16"}, "version", Verdict.FAIL),
        ({"redis_version": "6.2.0"}, "version", Verdict.OK),
        ({"redis_version": "255.255.255"}, "version", Verdict.OK),
        ({"maxmemory_policy": "allkeys-lru"}, "maxmemory-policy", Verdict.FAIL),
        ({"maxmemory_policy": "volatile-ttl"}, "maxmemory-policy", Verdict.WARN),
        ({"maxmemory": 0}, "memory", Verdict.OK),
        ({"used_memory": 80_000_000}, "memory", Verdict.WARN),
        ({"used_memory": 99_000_000}, "memory", Verdict.FAIL),
        ({"aof_enabled": 0}, "persistence", Verdict.WARN),
        ({"aof_last_write_status": "err"}, "persistence", Verdict.FAIL),
        ({"appendfsync": "no"}, "persistence", Verdict.WARN),
        ({"appendfsync": "everysec"}, "persistence", Verdict.OK),
        ({"appendfsync": None}, "persistence", Verdict.OK),
        ({"role": "slave"}, "role", Verdict.FAIL),
        ({"cluster_enabled": 1}, "cluster", Verdict.WARN),
    ],
)
def test_what_endangers_jobs_is_told_with_a_hint(changes: dict[str, Any], check: str, verdict: Verdict) -> None:
    finding = judged(**changes)[check]
    assert finding.verdict is verdict
    assert (finding.hint is None) == (verdict is Verdict.OK)


class FakeRedis:
    """Answers, with a clock that is `ahead_s` ahead."""

    def __init__(self, ahead_s: float = 0.0) -> None:
        self._ahead_s = ahead_s

    async def ping(self) -> bool:
        return True

    async def time(self) -> tuple[int, int]:
        return divmod(int((time.time() + self._ahead_s) * 1e6), 1_000_000)


@pytest.mark.parametrize(
    ("url", "verdict", "said"),
    [
        ("redis://me:canary@redis.example:6380/1", Verdict.WARN, "redis.example:6380 answers, without TLS"),
        ("rediss://:canary@redis.example:6380", Verdict.OK, "redis.example:6380 answers, over TLS"),
        ("redis://localhost", Verdict.OK, "localhost answers"),
        ("redis://", Verdict.OK, "localhost answers"),
        ("unix:///run/redis.sock?db=1", Verdict.OK, "/run/redis.sock answers"),
    ],
)
async def test_a_way_that_others_can_listen_on_is_told(url: str, verdict: Verdict, said: str) -> None:
    redis: Any = FakeRedis()
    (finding,) = await check_reach(redis, url)
    assert (finding.verdict, finding.found) == (verdict, said)


@pytest.mark.parametrize(
    ("ahead_s", "verdict"), [(0, Verdict.OK), (-30, Verdict.WARN), (30, Verdict.WARN), (3600, Verdict.FAIL)]
)
async def test_a_clock_that_is_apart_from_redis_is_told(ahead_s: float, verdict: Verdict) -> None:
    redis: Any = FakeRedis(ahead_s)
    (finding,) = await check_clock(redis)
    assert finding.verdict is verdict
    assert (finding.hint is None) == (verdict is Verdict.OK)


def test_a_redis_that_tells_nothing_is_skipped_not_accused() -> None:
    assert {finding.verdict for finding in judge({}, None)} == {Verdict.SKIPPED}


async def test_a_check_that_breaks_is_a_finding_of_its_own() -> None:
    async def check() -> list[Finding]:
        raise RuntimeError("https://store.example/x?X-Amz-Signature=canary broke")

    (finding,) = await isolated("storage", "bucket", check, deadline_s=5)
    assert (finding.verdict, finding.found) == (Verdict.FAIL, "RuntimeError: https://store.example/x broke")


async def test_a_check_that_hangs_ends_at_its_deadline() -> None:
    async def check() -> list[Finding]:
        await asyncio.Event().wait()
        return []

    (finding,) = await isolated("database", "reach", check, deadline_s=0.01)
    assert (finding.verdict, finding.found) == (Verdict.FAIL, "no answer within 0.01 s")


async def test_what_an_acl_forbids_is_skipped() -> None:
    async def check() -> list[Finding]:
        raise NoPermissionError("this user has no permissions to run the 'xinfo' command")

    (finding,) = await isolated("queue", "listeners", check, deadline_s=5)
    assert finding.verdict is Verdict.SKIPPED


async def test_secrets_are_removed_from_what_is_found_and_from_hints() -> None:
    async def check() -> list[Finding]:
        secret = f"password={CANARY}"
        return [Finding("redis", "reach", Verdict.FAIL, secret, hint=f"redis://:{CANARY}@host/0")]

    (finding,) = await isolated("redis", "reach", check, deadline_s=5)
    assert CANARY not in f"{finding}"


def test_a_database_error_is_told_without_its_text() -> None:
    error = OperationalError("SELECT 1", {}, ValueError(CANARY))
    assert told(error) == "ValueError"


@pytest.mark.parametrize(
    ("secret", "verdict"),
    [
        (None, Verdict.SKIPPED),
        ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", Verdict.OK),
        ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw,whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSv", Verdict.OK),
        (f"whsec_{CANARY}!", Verdict.FAIL),
        ("whsec_c2hvcnQ=", Verdict.FAIL),
    ],
)
async def test_a_webhook_secret_is_looked_at_and_never_shown(secret: str | None, verdict: Verdict) -> None:
    (finding,) = await backend.check_webhook_secret(ProducerSettings.model_validate({"WEBHOOK_SECRET": secret}))
    assert finding.verdict is verdict
    for part in (secret or "unset").split(","):
        assert part not in f"{finding}"


@pytest.mark.parametrize(
    ("token", "verdict"), [(None, Verdict.SKIPPED), (CANARY, Verdict.OK), (CANARY[:15], Verdict.WARN)]
)
async def test_of_the_token_only_the_length_is_told(token: str | None, verdict: Verdict) -> None:
    (finding,) = await backend.check_token(ProducerSettings.model_validate({"MODAL_API_TOKEN": token}))
    assert finding.verdict is verdict
    assert token is None or (f"{len(token)} characters" in finding.found and token not in f"{finding}")


def model_finding(model: str) -> Finding:
    return queue.judge_model([], model)


def test_a_model_folder_without_its_index_fails(tmp_path: Path) -> None:
    assert model_finding(str(tmp_path)).verdict is Verdict.FAIL
    (tmp_path / "model_index.json").write_text("{}")
    assert model_finding(str(tmp_path)).verdict is Verdict.OK


def test_a_model_folder_that_only_consumers_have_is_a_warning(tmp_path: Path) -> None:
    assert model_finding(str(tmp_path / "elsewhere")).verdict is Verdict.WARN


def test_a_hub_id_is_named_and_not_looked_for() -> None:
    finding = model_finding("stabilityai/stable-diffusion-xl-base-1.0")
    assert finding.verdict is Verdict.OK
    assert finding.found.startswith("stabilityai/stable-diffusion-xl-base-1.0, from the hub")
