"""Pictures of the results for the documentation: `python -m benchmarks.plots`.

Plain SVG, the same bytes for the same results, in the reader's own light or dark.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

from benchmarks.record import RESULTS, newest

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
LABELS = {
    ("A", "serial"): "A  diffusers, as people use it",
    ("A1", "serial"): "A′  diffusers, well set up",
    ("B", "serial"): "B  A′ compiled, hot-swapped LoRAs",
    ("C", "serial"): "C  A′ compiled, no LoRA",
    ("D", "serial"): "D  ours, one after another",
    ("D", "sustained"): "D  ours, sustained",
}
GROUPS = {
    "LoRA": ("load", "fuse", "unfuse", "unload", "prepare", "patch"),
    "text": ("text",),
    "denoising": ("denoise", "generate"),
    "decoding": ("decode",),
    "PNG": ("png",),
    "rest": ("set-up", "rest"),
}
# Okabe and Ito's, told apart by everybody, on white and on black
_COLOURS = ("#d55e00", "#e69f00", "#0072b2", "#009e73", "#cc79a7", "#999999")
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.faint { fill: #59636e; font-size: 12px }
.grid { stroke: #d1d9e0 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc }
  .faint { fill: #9198a1 }
  .grid { stroke: #3d444d }
}
"""
_WIDTH, _LEFT, _RIGHT, _TOP, _ROW, _BAR = 760, 250, 130, 44, 34, 20
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def comparison(lines: Sequence[Mapping[str, Any]]) -> str:
    """A bar for each engine: seconds per picture, the median, with p95 beside it."""
    rows = [
        (
            label,
            [("denoising", one["seconds"]["p50"])],
            f"{one['seconds']['p50']:.2f} s, p95 {one['seconds']['p95']:.2f}",
        )
        for label, one in _labelled(lines)
    ]
    return _bars("Seconds per picture, LoRA and PNG included (median)", rows)


def split(lines: Sequence[Mapping[str, Any]]) -> str:
    """Where those seconds go: a bar of parts for each engine that draws one picture after another."""
    rows = []
    for label, one in _labelled(lines):
        if "parts" in one:
            parts = [(group, _sum(one["parts"], names)) for group, names in GROUPS.items()]
            rows.append((label, parts, f"{sum(seconds for _, seconds in parts):.2f} s"))
    return _bars("Where the seconds go (medians, one picture after another)", rows, legend=tuple(GROUPS))


def _labelled(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    found = {(line["engine"], line["mode"]): line for line in lines}
    return [(label, found[name]) for name, label in LABELS.items() if name in found]


def _sum(parts: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> float:
    return sum(parts[name]["p50"] for name in names if name in parts)


def _bars(title: str, rows: Sequence[tuple[str, Sequence[tuple[str, float]], str]], legend: Sequence[str] = ()) -> str:
    longest = max((sum(seconds for _, seconds in parts) for _, parts, _ in rows), default=0.0) or 1.0
    scale = (_WIDTH - _LEFT - _RIGHT) / longest
    bottom = _TOP + _ROW * len(rows)
    svg = _picture(title, bottom + (58 if legend else 34))
    _axis(svg, longest, scale, bottom)
    for index, (label, parts, note) in enumerate(rows):
        y = _TOP + _ROW * index + (_ROW - _BAR) / 2
        _text(svg, _LEFT - 10, y + 15, label, anchor="end")
        x = float(_LEFT)
        for group, seconds in parts:
            _rectangle(svg, x, y, seconds * scale, tuple(GROUPS).index(group), f"{group}: {seconds:.3f} s")
            x += seconds * scale
        _text(svg, x + 8, y + 15, note)
    x = float(_LEFT)
    for name in legend:
        _rectangle(svg, x, bottom + 36, 12, tuple(GROUPS).index(name), name, height=12)
        _text(svg, x + 17, bottom + 46, name, faint=True)
        x += 30 + 7.5 * len(name)
    Xml.indent(svg)
    return Xml.tostring(svg, encoding="unicode") + "\n"


def _picture(title: str, height: int) -> Xml.Element:
    view = {"viewBox": f"0 0 {_WIDTH} {height}", "width": str(_WIDTH), "height": str(height), "role": "img"}
    svg = Xml.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", **view})
    Xml.SubElement(svg, "title").text = title
    Xml.SubElement(svg, "style").text = _STYLE
    _text(svg, 12, 22, title)
    return svg


def _axis(svg: Xml.Element, longest: float, scale: float, bottom: int) -> None:
    step = next((tick for tick in _TICKS if longest / tick <= 6), longest)
    for number in range(int(longest / step + 1e-9) + 1):
        x = f"{_LEFT + number * step * scale:.1f}"
        Xml.SubElement(svg, "line", {"x1": x, "x2": x, "y1": str(_TOP), "y2": str(bottom), "class": "grid"})
        _text(svg, float(x), bottom + 18, f"{number * step:g} s", anchor="middle", faint=True)


def _rectangle(
    svg: Xml.Element, x: float, y: float, width: float, colour: int, hint: str, *, height: float = _BAR
) -> None:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{width:.1f}", "height": f"{height:.1f}"}
    rectangle = Xml.SubElement(svg, "rect", {**place, "fill": _COLOURS[colour]})
    Xml.SubElement(rectangle, "title").text = hint


def _text(svg: Xml.Element, x: float, y: float, text: str, *, anchor: str = "start", faint: bool = False) -> None:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, **({"class": "faint"} if faint else {})}
    Xml.SubElement(svg, "text", place).text = text


def write(results: Path = RESULTS, folder: Path = IMAGES) -> list[Path]:
    """Writes both pictures from `engine.jsonl`. Returns their paths: none where nothing was measured."""
    lines = newest(results / "engine.jsonl", "engine", "mode")
    if not lines:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"engine-comparison.svg": comparison(lines), "latency-split.svg": split(lines)}
    for name, svg in pictures.items():
        (folder / name).write_text(svg)
    return [folder / name for name in pictures]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--images", type=Path, default=IMAGES)
    arguments = parser.parse_args()
    for path in write(arguments.results, arguments.images):
        print(path)


if __name__ == "__main__":
    main()
