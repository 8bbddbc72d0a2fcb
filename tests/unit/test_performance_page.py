"""docs/performance.md: its tables and pictures are what was measured, and nothing else."""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as everything
from benchmarks import cold_start, engine, plots, tables, worker
from benchmarks.record import command_line, newest, record

WORKLOAD = {"size": "1024x1024", "steps": 28, "cfg": 5.5, "rank": 32, "lora_mb": 93.0, "dtype": "float16"}
WHERE = {"gpu": "a GPU", "cpu": "a CPU", "versions": {"torch": "2.11", "diffusers": "0.42"}}
PAGE = "".join(f"{name}:\n<!-- {name} -->\nstale\n<!-- /{name} -->\n" for name in tables.TABLES)


def figures(seconds: float) -> dict[str, float]:
    return {"n": 20, "min": seconds, "p50": seconds, "p95": seconds, "max": seconds}


def a_line(engine: str, mode: str = "serial", **parts: float) -> dict[str, Any]:
    spread = {name: figures(seconds) for name, seconds in parts.items()}
    result = {"engine": engine, "mode": mode, "seconds": figures(sum(parts.values())), "parts": spread}
    return {**result, "workload": WORKLOAD, "environment": WHERE}


def written(folder: Path, name: str, *lines: dict[str, Any]) -> Path:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def results(tmp_path: Path) -> Path:
    usual = a_line("A", load=1.5, denoise=2.0, png=0.25)
    return written(
        tmp_path, "engine", usual, a_line("D", prepare=0.125, denoise=0.75), a_line("D", "switch", patch=0.0025)
    )


def test_the_pages_tables_are_those_of_the_results() -> None:
    """Red where a figure was typed by hand, or the page not made anew: `python -m benchmarks.tables` mends it."""
    page = tables.PAGE.read_text()
    assert tables.filled(page) == page


def test_the_pages_pictures_are_those_of_the_results(tmp_path: Path) -> None:
    for path in plots.write(folder=tmp_path):
        assert path.read_text() == (plots.IMAGES / path.name).read_text()


def test_tables_are_filled_from_the_results(results: Path) -> None:
    page = tables.filled(PAGE, results)
    assert "stale" not in page
    assert "| A  diffusers, as people use it | 3.750 | 3.750 | 3.750 | 3.750 | 20 |" in page
    assert (
        "a GPU; torch 2.11, diffusers 0.42; 1024x1024, 28 steps, CFG 5.5, float16; LoRAs of rank 32 (93.0 MB)." in page
    )
    assert "| denoise | 2000.0 | 750.0 |" in page
    assert "| load | 1500.0 | – |" in page
    assert "| patch | 2.50 | 2.50 | 20 |" in page
    assert tables.NOT_MEASURED in page
    assert tables.filled(page, results) == page


def test_quality_and_starts_have_their_tables(tmp_path: Path) -> None:
    likeness = {"ssim": 0.99999, "max_difference": 2, "mean_difference": 0.1}
    written(
        tmp_path,
        "quality",
        {"engine": "stock float16", "size": "512x512", "psnr_db": 61.25, **likeness},
        {"engine": "fast float16", "size": "512x512", "psnr_db": None, **likeness},
    )
    started = {"seconds": figures(9.0), "parts": {"imports": figures(4.0), "ready": figures(5.0)}}
    imports = {"speed": "fast", "cache": "imports", "imports_s": {"torch": 3.0}}
    written(tmp_path, "cold_start", imports, {"speed": "fast", "cache": "empty", **started})
    page = tables.filled(PAGE, tmp_path)
    assert "| 512x512 | stock float16 | 61.2 | 0.99999 | 2 | 0.100 |" in page
    assert "| 512x512 | fast float16 | equal | 0.99999 | 2 | 0.100 |" in page
    assert "| fast | empty | 9.0 | 4.00 | 5.00 | 20 |" in page


@pytest.mark.parametrize("page", ["", PAGE + PAGE], ids=["none", "two"])
def test_a_page_without_one_place_for_each_table_is_refused(page: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="places for the table"):
        tables.filled(page, tmp_path)


def test_bars_are_as_long_as_the_seconds_and_the_same_every_time(results: Path, tmp_path: Path) -> None:
    first, second = (plots.write(results, tmp_path / name) for name in ("one", "two"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    comparison, split = (path.read_text() for path in first)
    bars = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', comparison)]
    assert bars[0] / bars[1] == pytest.approx(3.75 / 0.875, rel=0.01)
    assert {"3.75 s", "LoRA", "denoising", "PNG"} <= set(re.findall(r"<text [^>]*>([^<]+)</text>", split))
    assert "<title>LoRA: 1.500 s</title>" in split


def test_without_results_there_is_no_picture(tmp_path: Path) -> None:
    assert plots.write(tmp_path, tmp_path / "images") == []


def test_a_recorded_line_says_where_it_came_from_and_the_newest_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "engine.jsonl"
    command = command_line("benchmarks.engine", ["--model", "/somewhere/private/sdxl", "--only", "A"])
    for seconds in (2.0, 1.0):
        record("engine", command, WORKLOAD, [{"engine": "A", "mode": "serial", "seconds": figures(seconds)}], out)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()][-1]["seconds"]["p50"] == 1.0
    [line] = newest(out, "engine", "mode")
    assert line["seconds"]["p50"] == 1.0
    assert line["command"] == "python -m benchmarks.engine --model sdxl --only A"
    assert line["environment"]["versions"]["torch"]
    assert line["measured_at"]
    assert len(out.read_text().splitlines()) == 2
    assert newest(tmp_path / "nothing.jsonl", "engine") == []


@pytest.mark.parametrize("small", [True, False], ids=["small", "whole"])
def test_every_benchmark_takes_the_options_it_is_given(small: bool, tmp_path: Path) -> None:
    parsers: dict[str, Callable[[list[str]], argparse.Namespace]] = {
        "benchmarks.engine": engine.parse_arguments,
        "benchmarks.cold_start": cold_start.parse_arguments,
        "benchmarks.worker": worker.parse,
    }
    for _, _, module, *words in everything.commands(tmp_path, tmp_path, small=small):
        options = parsers[module](words)
        assert options.model == options.out.parent == tmp_path


def test_a_start_is_split_into_its_phases() -> None:
    marks = [["interpreter", 100.25], ["imports", 102.0], ["ready", 105.0]]
    started = cold_start.Started(100.0, f"noise\n{json.dumps(marks)}\n", "")
    assert cold_start.phases(started) == {"interpreter": 0.25, "imports": 1.75, "ready": 3.0}


def test_heavy_imports_are_told_with_what_they_import() -> None:
    stderr = "import time: self [us] | cumulative | imported package\nimport time:  9 |  1500000 |   torch\nnoise\n"
    assert cold_start.imports(stderr + "import time:  9 |  20 | torch._C\n") == {"torch": 1.5}
