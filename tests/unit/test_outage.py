import asyncio

import pytest
from redis import exceptions
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import BusyLoadingError, NoPermissionError, NoScriptError, ReadOnlyError, ResponseError

from consumer import outage
from consumer.outage import until_answered


@pytest.mark.parametrize(
    "kind", [exceptions.ConnectionError, BusyLoadingError, ReadOnlyError, NoPermissionError, NoScriptError]
)
async def test_a_step_is_repeated_until_it_is_answered(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "_BACKOFF", ExponentialWithJitterBackoff(base=0.001, cap=0.001))
    failures = [kind("away")] * 3

    async def step() -> str:
        if failures:
            raise failures.pop()
        return "answer"

    assert await until_answered(step, what="step") == "answer"


@pytest.mark.parametrize(
    "text",
    [
        "Error running script (call to f_1): @user_script:3: @user_script: 3: -OOM command not allowed",
        "NOREPLICAS Not enough good replicas to write.",
        "MISCONF Redis is configured to save RDB snapshots",
        "Error running script: -READONLY You can't write against a read only replica.",
        "Error running script: @user_script: 1: The user executing the script can't run this command or subcommand",
        "Error running script: @user_script: 1: The user executing the script can't access at least one of the keys",
        "ERR ACL failure in script: User eve has no permissions to run the 'xadd' command script: f_1",
    ],
)
def test_refusals_that_pass_are_told_by_their_text_too(text: str) -> None:
    assert outage.is_passing(ResponseError(text))


async def test_what_repeating_cannot_cure_is_raised() -> None:
    async def step() -> None:
        raise ResponseError("WRONGTYPE")

    with pytest.raises(ResponseError):
        await until_answered(step, what="step")


async def test_a_step_can_be_given_up() -> None:
    async def step() -> None:
        raise exceptions.ConnectionError("away")

    task = asyncio.create_task(until_answered(step, what="step"))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
