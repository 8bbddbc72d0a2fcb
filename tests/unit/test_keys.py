import pytest
from redis.crc import key_slot

from schemas.keys import CANCEL_TTL_SECONDS, CONSUMER_GROUP, DEFAULT_LISTENER_GROUP, JobState, Keys, Priority

KEYS = Keys()


def every_key(keys: Keys) -> dict[str, str]:
    return {
        "{sdxl}:requests:high": keys.requests(Priority.HIGH),
        "{sdxl}:requests:normal": keys.requests(Priority.NORMAL),
        "{sdxl}:requests:low": keys.requests(Priority.LOW),
        "{sdxl}:completions": keys.completions,
        "{sdxl}:dead": keys.dead,
        "{sdxl}:delayed": keys.delayed,
        "{sdxl}:job:j-1": keys.job("j-1"),
        "{sdxl}:cancel:j-1": keys.cancel("j-1"),
        "{sdxl}:progress:j-1": keys.progress("j-1"),
        "{sdxl}:waiters:j-1": keys.waiters("j-1"),
        "{sdxl}:consumers": keys.consumers,
        "{sdxl}:consumers:gpu-1": keys.consumer("gpu-1"),
        "{sdxl}:counters": keys.counters,
        "{sdxl}:ended": keys.ended,
        "{sdxl}:tenants": keys.tenants,
    }


def test_the_keys_are_those_of_the_contract() -> None:
    for expected, key in every_key(KEYS).items():
        assert key == expected


@pytest.mark.parametrize("prefix", ["sdxl", "staging", "team-a.sdxl_2"])
def test_all_keys_of_a_prefix_share_one_hash_slot(prefix: str) -> None:
    slots = {key_slot(key.encode()) for key in every_key(Keys(prefix)).values()}
    assert slots == {key_slot(prefix.encode())}


def test_two_prefixes_share_no_key() -> None:
    assert not set(every_key(Keys("a")).values()) & set(every_key(Keys("b")).values())


def test_the_request_streams_come_most_urgent_first() -> None:
    assert KEYS.request_streams == ["{sdxl}:requests:high", "{sdxl}:requests:normal", "{sdxl}:requests:low"]


@pytest.mark.parametrize("priority", list(Priority))
def test_the_stream_says_the_priority(priority: Priority) -> None:
    assert Keys("a:b").priority_of(Keys("a:b").requests(priority)) is priority


def test_a_stream_of_no_priority_is_refused() -> None:
    with pytest.raises(ValueError, match="completions"):
        KEYS.priority_of(KEYS.completions)


def test_the_states_are_those_of_the_contract_and_three_of_them_end_a_run() -> None:
    assert [str(state) for state in JobState] == [
        "queued",
        "preparing",
        "running",
        "delayed",
        "succeeded",
        "failed",
        "cancelled",
    ]
    assert {state for state in JobState if state.terminal} == {"succeeded", "failed", "cancelled"}


def test_names_and_times_that_other_languages_write_are_those_of_the_contract() -> None:
    assert (CONSUMER_GROUP, DEFAULT_LISTENER_GROUP, CANCEL_TTL_SECONDS) == ("consumers", "listeners", 604_800)
