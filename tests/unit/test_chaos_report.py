"""The table of `make chaos` says what was noted, and which faults nobody has injected."""

import io
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from tests.chaos import report
from tests.chaos.report import Result, missing, note, quantile_s, rows, show

COUNTS = {"lost": 0, "duplicate_publications": 0, "duplicate_executions": 1, "leaked_signatures": 0}


def lines(*results: Result) -> list[str]:
    return [json.dumps(asdict(result)) for result in results]


def test_the_tests_of_a_fault_are_summed_up_in_the_catalogues_order() -> None:
    table = rows(
        lines(
            Result(7, "latency", 1, [0.5], COUNTS),
            Result(0, "soak: latency", 4, [1.0]),
            Result(3, "reply lost", 2, [3.0], COUNTS),
            Result(7, "latency", 2, [1.5, 2.5], COUNTS),
        )
    )
    assert [(row["number"], row["injected"], row["recoveries"]) for row in table] == [(3, 2, 1), (7, 3, 3), (0, 4, 1)]
    assert [row["duplicate_executions"] for row in table] == [1, 2, None]
    assert [row["recovery_p50_s"] for row in table] == [3.0, 1.5, 1.0]


def test_what_is_not_in_the_catalogue_is_told_apart_by_its_name() -> None:
    table = rows(lines(Result(0, "soak: b", 1, []), Result(0, "soak: a", 1, []), Result(0, "soak: b", 1, [])))
    assert [(row["fault"], row["injected"], row["recovery_p99_s"]) for row in table] == [
        ("soak: b", 2, None),
        ("soak: a", 1, None),
    ]


def test_a_fault_that_nobody_has_injected_is_missing() -> None:
    table = rows(lines(*(Result(number, "some", 1, [], COUNTS) for number in range(1, 46)), Result(0, "soak", 1, [])))
    assert missing(table) == [46]


@pytest.mark.parametrize(
    ("recoveries_s", "q", "expected"),
    [([], 0.99, None), ([2.0], 0.99, 2.0), ([3.0, 1.0, 2.0], 0.5, 2.0), ([float(n) for n in range(100)], 0.99, 99.0)],
    ids=["nothing", "one", "the middle", "the last of a hundred"],
)
def test_a_quantile_is_one_of_the_values(recoveries_s: list[float], q: float, expected: float | None) -> None:
    assert quantile_s(recoveries_s, q) == expected


def test_the_table_shows_counts_and_figures_and_a_dash_for_what_was_not_counted() -> None:
    console = Console(record=True, width=150, file=io.StringIO())
    show(rows(lines(Result(3, "reply lost", 2, [3.0], COUNTS), Result(0, "soak", 9, [], {}, {"seed": 5}))), console)
    shown = console.export_text()
    assert "soak: seed 5" in shown
    [third] = [line for line in shown.splitlines() if "reply lost" in line]
    assert [cell.strip() for cell in third.split("│")[1:-1]][2:] == ["2", "3.00", "3.00", "0", "0", "1", "0"]
    [last] = [line for line in shown.splitlines() if "│ soak" in line]
    assert last.count("–") == 6


def test_what_is_noted_is_written_with_what_is_missing_and_which_parts_have_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "chaos.json")
    for part, status in (("faults", "0"), ("soak", "1")):
        (tmp_path / part).mkdir()
        (tmp_path / part / "status").write_text(status)
    monkeypatch.setenv(report.OUT, str(tmp_path / "faults"))
    note(Result(1, "Redis down at start", 1, [0.25], COUNTS))
    (tmp_path / "soak/memory.json").write_text('{"jobs": 5}')
    monkeypatch.setenv(report.OUT, str(tmp_path))
    assert report.main() == 1
    written = json.loads((tmp_path / "chaos.json").read_text())
    assert written["parts"] == {"faults": 0, "soak": 1}
    assert written["memory"] == {"jobs": 5}
    assert written["missing_faults"] == list(range(2, 47))
    assert [row["recovery_p99_s"] for row in written["faults"]] == [0.25]
    assert "no result of these faults: 2, 3" in capsys.readouterr().out
