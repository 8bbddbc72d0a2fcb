"""The queue's state machine can fail: with any one mechanism taken out of the scripts, it goes red."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from demo.servers import RedisServer, redis_server
from tests.integration.machine_mutants import MUTANTS, Mutant
from tests.integration.queue_machine import a_machine

EXAMPLES = 600


@pytest.fixture(scope="module")
def redis_at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_queue_without_this_mechanism_is_found_out(
    redis_at: RedisServer, monkeypatch: pytest.MonkeyPatch, mutant: Mutant
) -> None:
    monkeypatch.setattr(mutant.module, mutant.script, mutant.text)
    budget = settings(
        max_examples=EXAMPLES,
        stateful_step_count=50,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(a_machine(redis_at.url), settings=budget)
