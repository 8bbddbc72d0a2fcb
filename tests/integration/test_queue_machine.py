"""The queue's state machine on a real Redis: a small budget here, a large one for `make chaos`."""

import os
from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from demo.servers import RedisServer
from tests.integration.queue_machine import a_machine

VARIABLE = "SDXL_CHAOS_EXAMPLES"
SMALL, LARGE = 50, 1500
VERDICTS = ("ok", "lost", "duplicate", "cancelled", "refused", "expired", "exhausted")
FENCED = ("start", "extend", "retry", "release", "finish")


def _settings() -> settings:
    """The same examples each time, unless a budget is given: `large`, or so many examples."""
    budget = os.environ.get(VARIABLE)
    return settings(
        max_examples=SMALL if not budget else LARGE if budget == "large" else int(budget),
        stateful_step_count=50,
        derandomize=not budget,
        print_blob=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )


def test_every_job_is_in_one_place_and_ends_once_whatever_happens_in_whichever_order(redis_at: RedisServer) -> None:
    """`tests.integration.machine_mutants` names the lines that it guards."""
    machine = a_machine(redis_at.url)
    run_state_machine_as_test(machine, settings=_settings())
    _does_something(machine.tally)


def _does_something(tally: Counter[str]) -> None:
    """A machine that never gets anywhere finds nothing: each verdict and each refusal has come up."""
    seen = {name for name, count in tally.items() if count}
    assert seen >= {f"begin: {verdict}" for verdict in VERDICTS}
    assert seen >= {f"{step}: {answer}" for step in FENCED for answer in ("changes", "lost")}
    assert seen >= {"submit: accepted", "replay: accepted", "cancelled while waiting"}
    assert tally["calls with an effect"] > tally["calls"] / 2
