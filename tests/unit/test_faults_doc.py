"""docs/faults.md names every fault of the catalogue, and tests that exist and inject it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.report import FAULTS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/faults.md").read_text()
ROWS = re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+?) \|$", PAGE, re.MULTILINE)


def fault_of(mark: ast.expr) -> int | None:
    """The number in `pytest.mark.fault(number, …)`; None of anything else."""
    match mark:
        case ast.Call(func=ast.Attribute(attr="fault"), args=[ast.Constant(value=int(number)), *_]):
            return number
    return None


def injected_in(file: Path) -> Iterator[tuple[str, int]]:
    """Test ids as the document writes them, with the faults that they are marked with, by a name of the module too."""
    named: dict[str, int] = {}
    for node in ast.parse(file.read_text()).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=mark):
                number = fault_of(mark)
                if number is not None:
                    named[name] = number
            case ast.FunctionDef(name=name, decorator_list=marks) if name.startswith("test_"):
                for mark in marks:
                    number = named.get(mark.id) if isinstance(mark, ast.Name) else fault_of(mark)
                    if number is not None:
                        yield f"{file.name}::{name}", number


INJECTED = [one for file in sorted((ROOT / "tests/chaos").glob("test_*.py")) for one in injected_in(file)]


def test_the_document_names_each_fault_once_in_order() -> None:
    assert [int(number) for number, *_ in ROWS] == list(range(1, FAULTS + 1))


def test_every_fault_is_injected_by_a_test_that_is_marked_with_it() -> None:
    assert {number for _, number in INJECTED} >= set(range(1, FAULTS + 1))


def test_the_tests_that_the_document_names_inject_the_fault_that_it_says() -> None:
    named = [(test, int(number)) for number, *_, tests in ROWS for test in re.findall(r"`(.+?)`", tests)]
    assert set(named) <= set(INJECTED)
    assert {number for _, number in named} == set(range(1, FAULTS + 1))
