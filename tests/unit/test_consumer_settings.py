"""What a consumer makes of its environment."""

import pytest
from pydantic import ValidationError

from consumer.settings import ConsumerSettings


def test_defaults_are_the_contracts() -> None:
    settings = ConsumerSettings()
    assert (settings.max_attempts, settings.lease_s, settings.prefetch) == (3, 30.0, 1)
    assert (settings.idle_exit_s, settings.drain_s) == (0.0, 25.0)
    assert (settings.device, settings.dtype) == ("cuda", "float16")


def test_seconds_may_be_decimals_and_empty_means_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDXL_LEASE_SECONDS", "2.5")
    monkeypatch.setenv("SDXL_PREFETCH", "")
    settings = ConsumerSettings()
    assert (settings.lease_s, settings.prefetch) == (2.5, 1)


@pytest.mark.parametrize("url", ["foo", "http://h:6379", "redis://:c4n4ry@h:port/0", "redis://h/0?ssl=c4n4ry"])
def test_a_url_that_is_none_of_redis_is_refused_without_being_repeated(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("REDIS_URL", url)
    with pytest.raises(ValidationError) as caught:
        ConsumerSettings()
    [problem] = caught.value.errors(include_input=False, include_url=False, include_context=False)
    assert problem["loc"] == ("REDIS_URL",)
    assert "c4n4ry" not in problem["msg"]


@pytest.mark.parametrize("url", ["redis://localhost:6379/0", "rediss://:pw@h:6380/1", "unix:///tmp/redis.sock"])
def test_a_url_of_redis_is_taken(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("REDIS_URL", url)
    assert ConsumerSettings().redis_url.get_secret_value() == url


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("R2_SECRET_ACCESS_KEY", "c4n4ry")
    monkeypatch.setenv("REDIS_URL", "redis://:c4n4ry@h/0")
    assert "c4n4ry" not in repr(ConsumerSettings())
