"""How long one picture takes, by engine: `python -m benchmarks.engine --model FOLDER`.

A   stock diffusers as people use it: load_lora_weights, fuse, draw, unfuse, unload
A1  the same, well set up: VAE in bfloat16, channels_last, cuDNN's attention, low_cpu_mem_usage
B   A1 compiled and launched as CUDA graphs, LoRAs hot-swapped
C   the same without any LoRA
D   ours, twice: one after another, and sustained as a consumer draws

All but C draw the same pictures, each with another LoRA, from the LoRA's file to the PNG. A line of JSON each.
"""

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import quality
from benchmarks.flops import picture_tflop
from benchmarks.gpu_sampler import sampled_gpu
from benchmarks.lora_files import LoraWriter, attention_layers
from benchmarks.our_engine import Ours
from benchmarks.record import command_line, record
from benchmarks.spread import spread
from benchmarks.usual_engines import AsPeopleUseIt, Compiled, HotSwapped, WellSetUp
from benchmarks.workload import Contender, Workload, add_options

CONTENDERS: dict[str, Callable[[Workload], Contender]] = {
    "A": AsPeopleUseIt,
    "A1": WellSetUp,
    "B": HotSwapped,
    "C": Compiled,
    "D": Ours,
}
_SWITCHES = 5
_DIGITS = 6  # a LoRA's way into the weights takes milliseconds


def results_of(name: str, workload: Workload, tflop: float) -> Iterator[dict[str, Any]]:
    """Measures one engine. `seconds`: of whole pictures; `parts`: medians; `set_up_s`: loading, compiling, warm-ups.

    `tflop`: of one picture.
    """
    _forget()
    began = time.perf_counter()
    contender = CONTENDERS[name](workload)
    for number in range(workload.warm_ups):
        contender.draw(number)
    about = {"engine": name, "set_up_s": round(time.perf_counter() - began, 2)}
    with sampled_gpu() as gpu:
        pictures = [contender.draw(number) for number in range(workload.warm_ups, len(workload.loras))]
    serial = _figures([sum(parts.values()) for parts in pictures], tflop)
    yield {**about, "mode": "serial", **serial, "parts": _medians(pictures), **_per_step(pictures, workload), **gpu}
    if isinstance(contender, Ours):
        about["class"] = type(contender.engine).__name__
        with sampled_gpu() as gpu:
            intervals = contender.sustained()
        yield {**about, "mode": "sustained", **_figures(intervals, tflop), **gpu}
        pieces = contender.switch(min(_SWITCHES, len(workload.loras)))
        yield {
            **about,
            "mode": "switch",
            "parts": {piece: spread(seconds, _DIGITS) for piece, seconds in pieces.items()},
        }


def _figures(seconds: Sequence[float], tflop: float) -> dict[str, Any]:
    figures = spread(seconds, _DIGITS)
    peak = {"peak_vram_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)} if torch.cuda.is_available() else {}
    return {"seconds": figures, "tflop": round(tflop, 3), "tflop_per_s": round(tflop / figures["p50"], 2), **peak}


def _medians(pictures: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {part: spread([parts[part] for parts in pictures], _DIGITS) for part in pictures[0]}


def _per_step(pictures: Sequence[dict[str, float]], workload: Workload) -> dict[str, float]:
    if "denoise" not in pictures[0]:
        return {}
    p50 = spread([parts["denoise"] for parts in pictures], _DIGITS)["p50"]
    return {"ms_per_step": round(1000 * p50 / workload.steps, 3)}


def _forget() -> None:
    """Lets go of the engine before."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def workload_of(arguments: argparse.Namespace, folder: Path) -> Workload:
    """The workload of a command line; its LoRA files are written into `folder`."""
    writer = LoraWriter(attention_layers(arguments.model))
    count = 1 if arguments.quality else arguments.warm_ups + arguments.runs
    loras = writer.write_all(folder, [arguments.rank] * count)
    return replace(Workload.of(arguments, loras, warm_ups=arguments.warm_ups), speed=arguments.speed)


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(CONTENDERS), help="A,A1,B,C,D")
    parser.add_argument("--speed", choices=("auto", "stock", "fast"), default="auto", help="which of our engines D is")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--warm-ups", type=int, default=3)
    parser.add_argument("--quality", action="store_true", help="compare pictures of all sizes with stock float32")
    arguments = parser.parse_args(words)
    if unknown := set(arguments.only) - set(CONTENDERS):
        parser.error(f"no such engine: {', '.join(sorted(unknown))}")
    if arguments.warm_ups < 1 or arguments.runs < 1:
        parser.error("at least one warm-up and one run")
    return arguments


def measured(arguments: argparse.Namespace, workload: Workload) -> Iterator[dict[str, Any]]:
    """The results, each as soon as it is there."""
    if arguments.quality:
        yield from quality.compare(workload, [arguments.size] if arguments.size else quality.SIZES)
        return
    tflop = picture_tflop(
        workload.model, width=workload.width, height=workload.height, steps=workload.steps, cfg=workload.cfg
    )
    for name in arguments.only:
        try:
            yield from results_of(name, workload, tflop)
        except Exception as error:  # the others' results count without it
            traceback.print_exc()
            yield {"engine": name, "mode": "failed", "error": type(error).__name__}


def main(words: Sequence[str] | None = None) -> int:
    """Measures what the command line asks for. Returns the exit status: 1 where an engine failed."""
    words = sys.argv[1:] if words is None else words
    arguments = parse_arguments(words)
    with TemporaryDirectory(prefix="engine-") as folder:
        workload = workload_of(arguments, Path(folder))
        title = "quality" if arguments.quality else "engine"
        command = command_line("benchmarks.engine", words)
        results = record(title, command, workload.described(), measured(arguments, workload), arguments.out)
    return int(any(result.get("mode") == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
