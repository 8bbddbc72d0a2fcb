"""Every fault has a world of its own, in which the invariants are checked after it, whatever the test has looked at."""

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.chaos.invariants import verify
from tests.chaos.report import Result, note
from tests.chaos.world import World, a_world


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(number, name, forgot=False): a fault of the catalogue, docs/faults.md")


@pytest.fixture
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    fault = request.node.get_closest_marker("fault")
    assert fault is not None, "a test with a world says which fault it injects"
    number, name = fault.args
    with a_world(tmp_path) as world:
        yield world
        if request.node.stash.get(_FAILED, False):
            return
        assert world.injections, "nothing was injected"
        counts = verify(world, forgot=fault.kwargs.get("forgot", False))
        note(Result(number, name, world.injections, world.recoveries_s, counts))


_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and report.failed:
        item.stash[_FAILED] = True
    return report
