"""The benchmark of switches, small: it finds no weight changed by ours, and many by the usual calls."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import switches
from consumer.lora.stacks import Stack

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switches, "POOL", 4)
    monkeypatch.setattr(switches, "FRESH_EVERY", 20)
    monkeypatch.setattr(switches, "LOOK_EVERY", 10)
    monkeypatch.setattr(switches, "TIMED", (("attention", 8),))


def results(out: Path, status: int = 0) -> list[dict[str, Any]]:
    words = ["--device", "cpu", "--switches", "40", "--runs", "1", "--usual", "1", "--out", str(out)]
    assert switches.main(words) == status
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.usefixtures("small")
def test_no_weight_is_changed_after_switches_of_every_kind_and_many_are_the_usual_way(tmp_path: Path) -> None:
    ours, timed, usual = results(tmp_path / "switches.jsonl")
    assert (ours["what"], ours["switches"], ours["looks"]) == ("switches", 40, 4)
    assert (ours["weights_changed"], ours["parameters_found_changed"]) == (0, 0)
    assert (timed["what"], timed["extent"], timed["rank"], timed["patch_s"]["n"]) == ("time", "attention", 8, 1)
    assert usual["what"] == "usual"
    assert usual["weights_changed"] > 1000


@pytest.mark.usefixtures("small")
def test_weights_that_are_not_copied_back_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stack, "copy_back", lambda stack, rows: None)
    ours = results(tmp_path / "switches.jsonl", status=1)[0]
    assert ours["weights_changed"] > 0
    assert ours["parameters_found_changed"] > 0
