"""Whether weights are still themselves after many LoRAs, and what a switch costs: `python -m benchmarks.switches`.

On `--device cuda` SDXL's whole architecture with random weights in float16, else the tiny model. Three kinds of lines:
`switches` after random ones of every kind, failures among them; `usual` after fuse and unfuse as diffusers and peft do
it, on a model of its own; `time` for LoRAs of one extent and rank.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.full_size import drawing_on, random_unet
from benchmarks.random_loras import SCALES, RandomLoras
from benchmarks.record import command_line, record
from benchmarks.spread import spread
from consumer.engine.stock import adopt
from consumer.lora.deltas import Delta, LowRankDelta
from consumer.lora.shapes import lora_parameters
from consumer.lora.weights import Patch, PatchableWeights
from demo import tiny_sdxl
from tests import sdxl_base

POOL = 16  # patches that are kept
FRESH_EVERY = 40  # switches: then one of them is drawn anew
LOOK_EVERY = 100
TIMED = (("attention", 32), ("linears", 8), ("linears", 32), ("linears", 128))


class Stopped(Exception):
    """What a patch fails with on purpose."""


@dataclass(frozen=True)
class Failing:
    """A delta that cannot be computed."""

    module: str = "unet.conv_out"
    part: str = "bias"

    def change(self, base: Tensor) -> Tensor:
        raise Stopped


def a_model(device: str) -> Any:
    """Everything that a LoRA can touch, on `device`, float16."""
    if device == "cpu":
        with TemporaryDirectory() as temporary:
            folder = tiny_sdxl.build(Path(temporary) / "tiny")
            return SimpleNamespace(
                unet=UNet2DConditionModel.from_pretrained(folder / "unet", dtype=torch.float16),
                text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float16),
                text_encoder_2=CLIPTextModelWithProjection.from_pretrained(
                    folder / "text_encoder_2", dtype=torch.float16
                ),
            )
    with drawing_on(device):
        return SimpleNamespace(
            unet=random_unet(device),
            text_encoder=sdxl_base.text_encoder(),
            text_encoder_2=sdxl_base.text_encoder_2(),
        )


@torch.no_grad()
def switches(weights: PatchableWeights, model: Any, count: int) -> Iterator[dict[str, Any]]:
    """`count` random switches; how many weights are not what they were, against copies of the benchmark's own."""
    before = {name: parameter.detach().clone() for name, parameter in lora_parameters(model)}
    loras, chance = RandomLoras(before, seed=1), Random(2)
    pool = [a_patch(weights, loras, chance) for _ in range(POOL)]
    failed = looks = found = 0
    began = time.perf_counter()
    for number in range(1, count + 1):
        if number % FRESH_EVERY == 0:
            pool[chance.randrange(POOL)] = a_patch(weights, loras, chance)
        try:
            weights.patch(chance.choice(pool))
        except Stopped:
            failed += 1
        if number % LOOK_EVERY == 0 or number == count:
            weights.restore()
            looks += 1
            found += len(weights.changed())
    seconds = time.perf_counter() - began
    changed = sum(foreign(parameter, before[name]) for name, parameter in lora_parameters(model))
    yield {
        "what": "switches",
        "switches": count,
        "failed_on_purpose": failed,
        "weights": sum(parameter.numel() for parameter in before.values()),
        "looks": looks,
        "parameters_found_changed": found,
        "weights_changed": changed,
        "seconds": round(seconds, 2),
    }


def a_patch(weights: PatchableWeights, loras: RandomLoras, chance: Random) -> Patch:
    """Up to three LoRAs together, or none; one in sixteen patches fails in the end."""
    chosen: list[tuple[Sequence[Delta], float]] = [
        (loras.draw(), chance.choice(SCALES)) for _ in range(chance.choice((0, 1, 1, 1, 2, 3)))
    ]
    if chance.random() < 1 / 16:
        chosen.append(([Failing()], 1.0))
    return weights.prepare(chosen)


def foreign(parameter: Tensor, before: Tensor) -> int:
    """How many values differ in any bit."""
    return int((parameter.detach().view(torch.int16) != before.view(torch.int16)).sum())


@torch.no_grad()
def usual(model: Any, count: int) -> Iterator[dict[str, Any]]:
    """`count` LoRAs of rank 32 on the attention layers, loaded, fused, unfused and unloaded with the usual calls."""
    unet = model.unet
    before = {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}
    loras = RandomLoras(dict(lora_parameters(model)), seed=3)
    seconds: list[float] = []
    for number in range(1, count + 1):
        state = state_dict(loras.low_rank(loras.weights("attention"), 32))
        began = time.perf_counter()
        unet.load_lora_adapter(state, prefix="unet", adapter_name="lora")
        unet.fuse_lora()
        unet.unfuse_lora()
        unet.unload_lora()
        synchronize(unet.device.type == "cuda")
        seconds.append(time.perf_counter() - began)
        if number in (1, count):
            changed = [foreign(parameter, before[name]) for name, parameter in unet.named_parameters()]
            weights = sum(parameter.numel() for parameter in before.values())
            yield {
                "what": "usual",
                "switches": number,
                "weights": weights,
                "weights_changed": sum(changed),
                "switch_s": spread(seconds),
            }


def state_dict(deltas: Sequence[LowRankDelta]) -> dict[str, Tensor]:
    """The LoRA as peft names it, its alpha (its rank there) in the values."""
    tensors = {}
    for delta in deltas:
        tensors[f"{delta.module}.lora_A.weight"] = delta.down
        tensors[f"{delta.module}.lora_B.weight"] = delta.up * delta.factor
    return tensors


def timed(weights: PatchableWeights, model: Any, runs: int) -> Iterator[dict[str, Any]]:
    """What preparing, patching and restoring take; `launch`: what the CPU does of a patch."""
    parameters = dict(lora_parameters(model))
    loras, on_gpu = RandomLoras(parameters, seed=4), next(iter(parameters.values())).is_cuda
    for extent, rank in TIMED:
        deltas = loras.low_rank(loras.weights(extent), rank)
        size = sum(half.numel() * half.element_size() for delta in deltas for half in (delta.down, delta.up))
        seconds: dict[str, list[float]] = {"prepare": [], "patch": [], "launch": [], "restore": []}
        for _ in range(runs + 2):
            began = time.perf_counter()
            patch = weights.prepare([(deltas, 0.8)])
            synchronize(on_gpu)
            seconds["prepare"].append(time.perf_counter() - began)
            launch, took = clocked(partial(weights.patch, patch), on_gpu)
            seconds["launch"].append(launch)
            seconds["patch"].append(took)
            seconds["restore"].append(clocked(weights.restore, on_gpu)[1])
        parts = {f"{part}_s": spread(values[2:], digits=6) for part, values in seconds.items()}
        yield {"what": "time", "extent": extent, "rank": rank, "modules": len(deltas), "bytes": size, **parts}


def clocked(run: Callable[[], None], on_gpu: bool) -> tuple[float, float]:
    """Seconds until `run` returns, and, on a GPU, that the stream worked on what it launched."""
    began = time.perf_counter()
    if not on_gpu:
        run()
        return time.perf_counter() - began, time.perf_counter() - began
    first, last = an_event(), an_event()
    first.record()
    run()
    last.record()
    returned = time.perf_counter() - began
    last.synchronize()
    return returned, first.elapsed_time(last) / 1000


def an_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch has no types for it


def synchronize(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def measured(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    model = a_model(options.device)
    weights = adopt(model)
    yield from switches(weights, model, options.switches)
    yield from timed(weights, model, options.runs)
    yield from usual(a_model(options.device), options.usual)


def main(words: Sequence[str]) -> int:
    """Returns the exit status: 1 where our switches have changed a weight."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.switches", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--switches", type=int, default=10_000)
    parser.add_argument("--usual", type=int, default=3, help="switches with the usual calls")
    parser.add_argument("--runs", type=int, default=30, help="of each timed switch")
    parser.add_argument("--out", type=Path, help="a file to which the lines are added")
    options = parser.parse_args(words)
    workload = {"model": "SDXL base 1.0" if options.device == "cuda" else "tiny", "dtype": "float16"}
    command = command_line("benchmarks.switches", words)
    results = record("switches", command, workload, measured(options), options.out)
    return int(any(result["weights_changed"] for result in results if result["what"] == "switches"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
