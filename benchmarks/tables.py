"""The tables of docs/performance.md, from the results: `python -m benchmarks.tables` writes them into the page.

Each stands between `<!-- name -->` and `<!-- /name -->`, so that no figure of the page is typed by hand.
"""

import argparse
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plots import LABELS
from benchmarks.record import RESULTS, newest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
NOT_MEASURED = "*Not measured yet.*"

Row = Sequence[str]


def engines(results: Path) -> str:
    """Every engine's seconds per picture, and what they were reached with."""
    lines = {(one["engine"], one["mode"]): one for one in newest(results / "engine.jsonl", "engine", "mode")}
    rows = [
        (
            label,
            *(_number(lines[name]["seconds"][figure], 3) for figure in ("p50", "p95", "min", "max")),
            str(lines[name]["seconds"]["n"]),
            *(_optional(lines[name], field, digits) for field, digits in _EXTRAS),
        )
        for name, label in LABELS.items()
        if name in lines
    ]
    head = ("engine", "p50 s", "p95 s", "min s", "max s", "n", "ms/step", "TFLOP/s", "VRAM GiB", "MHz", "W", "set-up s")
    return _table(head, rows) + _provenance(lines.values())


def parts(results: Path) -> str:
    """The parts of one picture, by engine: medians in ms."""
    found = {one["engine"]: one for one in newest(results / "engine.jsonl", "engine", "mode") if _is_serial(one)}
    serial = {label.split()[0]: name for (name, mode), label in LABELS.items() if mode == "serial"}
    lines = {letter: found[name] for letter, name in serial.items() if name in found}
    names = dict.fromkeys(name for one in lines.values() for name in one["parts"])
    rows = [
        (name, *(_milliseconds(one["parts"].get(name)) for one in lines.values()))
        for name in names
        if any(one["parts"].get(name, {"p50": 0})["p50"] > 0.0005 for one in lines.values())
    ]
    return _table(("ms (median)", *lines), rows)


def switch(results: Path) -> str:
    """What one LoRA costs our engine, piece by piece."""
    lines = [one for one in newest(results / "engine.jsonl", "engine", "mode") if one["mode"] == "switch"]
    rows = [
        (name, *(_number(1000 * spread[figure], 2) for figure in ("p50", "p95")), str(spread["n"]))
        for one in lines
        for name, spread in one["parts"].items()
    ]
    return _table(("piece", "p50 ms", "p95 ms", "n"), rows)


def quality(results: Path) -> str:
    """How near each engine's pictures are to stock float32."""
    rows = [
        (
            one["size"],
            one["engine"],
            "equal" if one["psnr_db"] is None else _number(one["psnr_db"], 1),
            _number(one["ssim"], 5),
            str(one["max_difference"]),
            _number(one["mean_difference"], 3),
        )
        for one in newest(results / "quality.jsonl", "engine", "size")
    ]
    return _table(("size", "engine", "PSNR dB", "SSIM", "max difference", "mean difference"), rows)


def cold_start(results: Path) -> str:
    """From a process's start to its first picture."""
    lines = [one for one in newest(results / "cold_start.jsonl", "speed", "cache") if "seconds" in one]
    names = dict.fromkeys(name for one in lines for name in one["parts"])
    rows = [
        (
            one["speed"],
            one["cache"],
            _number(one["seconds"]["p50"], 1),
            *(_number(one["parts"][name]["p50"], 2) if name in one["parts"] else "–" for name in names),
            str(one["seconds"]["n"]),
        )
        for one in lines
    ]
    return _table(("engine", "Triton's cache", "first picture s", *(f"{name} s" for name in names), "n"), rows)


def worker(results: Path) -> str:
    """Job to job over the wire, beside the usual way."""
    rows = [
        (
            one["way"],
            one["workload"],
            str(one["job_to_job_s"]["n"]),
            *(_number(one["job_to_job_s"][figure], 3) for figure in ("p50", "p95")),
            _number(one["images_per_s"], 3),
            _optional(one, "gpu_idle_percent", 2),
        )
        for one in newest(results / "worker.jsonl", "way", "workload")
    ]
    return _table(("", "workload", "n", "p50 s", "p95 s", "images/s", "GPU idle %"), rows)


def weights(results: Path) -> str:
    """How many weights are not what they were: after random switches by ours, and after the usual fuse and unfuse."""
    rows = [
        (label, str(one["switches"]), f"{one['weights_changed']:,}", f"{one['weights']:,}")
        for what, label in (("switches", "ours, kinds at random, one in nine failing"), ("usual", "fuse and unfuse"))
        for one in newest(results / "switches.jsonl", "what")
        if one["what"] == what
    ]
    return _table(("", "switches", "weights changed", "of"), rows)


def patches(results: Path) -> str:
    """What patching in costs on the device, by how much a LoRA touches."""
    rows = [
        (
            f"{one['extent']}, rank {one['rank']}",
            str(one["modules"]),
            _number(one["bytes"] / 1e6, 0),
            *(_number(1000 * one[part][figure], 2) for part, figure in _PATCH_PARTS),
            str(one["patch_s"]["n"]),
        )
        for one in newest(results / "switches.jsonl", "what", "extent", "rank")
        if one["what"] == "time"
    ]
    head = ("LoRA", "modules", "MB", "patch p50 ms", "p95 ms", "launching it ms", "restore ms", "packing ms", "n")
    return _table(head, rows)


TABLES: Mapping[str, Callable[[Path], str]] = {
    "engines": engines,
    "parts": parts,
    "switch": switch,
    "weights": weights,
    "patches": patches,
    "quality": quality,
    "cold start": cold_start,
    "worker": worker,
}
_EXTRAS = (
    ("ms_per_step", 2),
    ("tflop_per_s", 0),
    ("peak_vram_gib", 1),
    ("sm_clock_mhz", 0),
    ("power_w", 0),
    ("set_up_s", 0),
)


_PATCH_PARTS = (("patch_s", "p50"), ("patch_s", "p95"), ("launch_s", "p50"), ("restore_s", "p50"), ("prepare_s", "p50"))


def filled(page: str, results: Path = RESULTS) -> str:
    """The page with its tables made anew. Raises ValueError for one that has no place in it."""
    for name, make in TABLES.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        table = make(results).replace("\\", r"\\")
        page, count = block.subn(rf"\g<1>{table}\n\g<2>", page)
        if count != 1:
            raise ValueError(f"the page has {count} places for the table {name!r}")
    return page


def _table(head: Row, rows: Sequence[Row]) -> str:
    if not rows:
        return NOT_MEASURED
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _provenance(lines: Iterable[Mapping[str, Any]]) -> str:
    for one in lines:
        where, what = one["environment"], one["workload"]
        machine = where["gpu"] or where["cpu"]
        libraries = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "diffusers"))
        picture = f"{what['size']}, {what['steps']} steps, CFG {what['cfg']}, {what['dtype']}"
        return f"\n\n{machine}; {libraries}; {picture}; LoRAs of rank {what['rank']} ({what['lora_mb']} MB)."
    return ""


def _is_serial(one: Mapping[str, Any]) -> bool:
    return bool(one["mode"] == "serial")


def _milliseconds(figures: Mapping[str, float] | None) -> str:
    return "–" if figures is None else _number(1000 * figures["p50"], 1)


def _optional(one: Mapping[str, Any], field: str, digits: int) -> str:
    return "–" if one.get(field) is None else _number(one[field], digits)


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    arguments.page.write_text(filled(arguments.page.read_text(), arguments.results))


if __name__ == "__main__":
    main()
