"""Any LoRA file becomes canonical deltas, or is refused with a reason."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from consumer.errors import LoraInvalid
from consumer.lora.algebra import DoraDelta, FullDelta, HadamardDelta, KroneckerDelta, Matrix, with_core
from consumer.lora.bounds import KnownDelta, is_small, longest, no_longer_than
from consumer.lora.deltas import LowRankDelta, ParsedLora
from consumer.lora.tensors import FileTensors
from schemas.lora.errors import LoraUnusable
from schemas.lora.header import read_header, shown
from schemas.lora.kinds import Kind
from schemas.lora.plan import LoraPlan, PlannedDelta, plan
from schemas.lora.shapes import ModelShapes

_CORES = ("mid", "hada_t1", "lokr_t2")


def parse(path: Path, model: ModelShapes) -> ParsedLora:
    """Reads a LoRA file for a model, of every kind and naming that `schemas.lora` knows.

    Raises LoraInvalid for every file that is not wholly understood, and OSError where it cannot be read. Weights are
    read only when names, dtypes, shapes and alphas have passed.
    """
    try:
        header = read_header(path)
        planned = plan(path, header, model)
        tensors = FileTensors(path, header, [name for delta in planned.deltas for name in delta.names])
        return ParsedLora(tuple(_deltas(planned, tensors)), planned.skipped)
    except LoraUnusable as error:
        raise LoraInvalid(str(error), details=error.details) from None


def _deltas(planned: LoraPlan, tensors: FileTensors) -> Iterator[KnownDelta]:
    for delta in planned.deltas:
        largest = max(_finite(name, tensors) for name in delta.names)
        made = _delta(delta, tensors)
        # what a core makes of its tensors may be larger than they are
        has_core = not delta.tensors.keys().isdisjoint(_CORES)
        if (has_core or not is_small(made, no_longer_than(largest))) and not is_small(made, longest):
            raise LoraUnusable(
                f"The LoRA's values for {delta.module} are too large: weights would overflow.",
                details={"module": delta.module},
            )
        yield made


def _finite(name: str, tensors: FileTensors) -> float:
    """The largest absolute value in a tensor."""
    largest = tensors.largest(name)
    if not math.isfinite(largest):
        raise LoraUnusable(f"The tensor '{shown(name)}' has NaN or Inf.", details={"tensor": shown(name)})
    return largest


def _delta(planned: PlannedDelta, tensors: FileTensors) -> KnownDelta:
    parts = {part: tensors[name] for part, name in planned.tensors.items()}
    if planned.kind is Kind.FULL:
        return FullDelta(planned.module, planned.part, parts["diff"], planned.factor)
    made = _PRODUCTS[planned.kind](planned, parts)
    if planned.magnitude is None:
        return made
    return DoraDelta(made, tensors[planned.magnitude].flatten(), planned.magnitude_axis)


def _low_rank(planned: PlannedDelta, parts: dict[str, Tensor]) -> LowRankDelta:
    down = parts["down"].flatten(1)
    if "mid" in parts:
        down = with_core(parts["mid"], down)
    return LowRankDelta(planned.module, down, parts["up"].flatten(1), 1.0 if planned.alpha is None else planned.alpha)


def _hadamard(planned: PlannedDelta, parts: dict[str, Tensor]) -> HadamardDelta:
    first = _matrix(parts["hada_w1_a"], parts["hada_w1_b"], parts.get("hada_t1"))
    second = _matrix(parts["hada_w2_a"], parts["hada_w2_b"], parts.get("hada_t2"))
    return HadamardDelta(planned.module, first, second, planned.factor)


def _kronecker(planned: PlannedDelta, parts: dict[str, Tensor]) -> KroneckerDelta:
    left, right = (
        Matrix(parts[whole].flatten(1))
        if whole in parts
        else _matrix(parts[f"{whole}_a"], parts[f"{whole}_b"], parts.get(core))
        for whole, core in (("lokr_w1", "lokr_t1"), ("lokr_w2", "lokr_t2"))
    )
    return KroneckerDelta(planned.module, left, right, planned.factor)


def _matrix(left: Tensor, right: Tensor, core: Tensor | None) -> Matrix:
    # beside a core LyCORIS keeps the left one as [rank, outputs]
    if core is None:
        return Matrix(left.flatten(1), right.flatten(1))
    return Matrix(left.flatten(1).t(), with_core(core, right.flatten(1)))


_PRODUCTS: dict[Kind, Callable[[PlannedDelta, dict[str, Tensor]], LowRankDelta | HadamardDelta | KroneckerDelta]] = {
    Kind.LORA: _low_rank,
    Kind.LOHA: _hadamard,
    Kind.LOKR: _kronecker,
}
