"""What the tensors of one module make together: the kind of change, its rank, and the shape of the weight it is for."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from pydantic import JsonValue

from schemas.lora.errors import LoraUnusable
from schemas.lora.header import TensorInfo, shown
from schemas.lora.keys import Parts

MAX_RANK = 1024
# A Tucker core of rank r becomes a [r, inputs * kernel] matrix: a small file could ask for gigabytes.
MAX_CORE_RANK = 256

Shape = tuple[int, ...]


class Kind(StrEnum):
    """How a change is kept. Any but the last may be DoRA besides, which sets the length of each row or column."""

    LORA = "LoRA"
    LOHA = "LoHa"
    LOKR = "LoKr"
    FULL = "full difference"


_PARTS = {
    Kind.LORA: ("down", "up", "mid"),
    Kind.LOHA: ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    Kind.LOKR: ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    Kind.FULL: ("diff",),
}


@dataclass(frozen=True, slots=True)
class Change:
    """What some of a file's tensors change in one weight.

    `tensors`: their names by part. `made`: the shape of what they make, [out, in, ...], without a kernel of 1x1.
    `rank`: None where nothing is decomposed.
    """

    kind: Kind
    tensors: Mapping[str, str]
    made: Shape
    rank: int | None


class _Tensors:
    """The tensors of one module, by part."""

    def __init__(self, alias: str, parts: Parts, header: Mapping[str, TensorInfo]) -> None:
        self._alias = alias
        self._shapes = {part: squeezed(header[name].shape) for part, name in parts.items()}

    def __contains__(self, part: str) -> bool:
        return part in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def shape(self, part: str) -> Shape:
        return self._shapes[part]

    def require(self, *wanted: str) -> None:
        missing = [part for part in wanted if part not in self]
        if missing:
            raise LoraUnusable(
                f"The LoRA for '{shown(self._alias)}' lacks its {' and '.join(missing)} part.",
                details={"module": shown(self._alias)},
            )

    def matrix(self, first: str, second: str, core: str) -> tuple[Shape, int]:
        """The shape of `first @ second`, or of what they make of a Tucker core, and its rank.

        LyCORIS turns the first around where there is a core: [rank, out].
        """
        self.require(first, second)
        left, right = self._shapes[first], self._shapes[second]
        if core in self:
            return self._tucker(first, left[::-1], second, core)
        if len(left) != 2 or len(right) < 2 or left[1] != right[0]:
            raise self.misfit(first, second)
        return (left[0], *right[1:]), self._rank(right[0], MAX_RANK)

    def convolution(self) -> tuple[Shape, int]:
        """The same of LoCon, where `up` is not turned around."""
        if "mid" not in self:
            return self.matrix("up", "down", "mid")
        self.require("up", "down")
        return self._tucker("up", self._shapes["up"], "down", "mid")

    def _tucker(self, first: str, left: Shape, second: str, core: str) -> tuple[Shape, int]:
        right, middle = self._shapes[second], self._shapes[core]
        if not (len(left) == len(right) == 2 and left[1] == right[0] and middle[:2] == (right[0], right[0])):
            raise self.misfit(first, second, core)
        return (left[0], right[1], *middle[2:]), self._rank(right[0], MAX_CORE_RANK)

    def _rank(self, rank: int, most: int) -> int:
        if rank > most:
            raise LoraUnusable(f"The LoRA's rank is {rank}, more than {most}.", details={"module": shown(self._alias)})
        return rank

    def misfit(self, *parts: str) -> LoraUnusable:
        details: dict[str, JsonValue] = {"module": shown(self._alias)}
        details |= {f"{part}_shape": [*self._shapes[part]] for part in parts}
        return LoraUnusable(
            f"The parts of the LoRA for '{shown(self._alias)}' do not fit each other.",
            details=details,
        )


def weight_change(alias: str, parts: Parts, header: Mapping[str, TensorInfo]) -> Change | None:
    """What the tensors of the module `alias` make of its weight; None where they are for its bias alone.

    Raises LoraUnusable for halves, several kinds for one weight, and parts that do not fit each other.
    """
    if "alpha" in parts and math.prod(header[parts["alpha"]].shape) != 1:
        raise LoraUnusable(f"The alpha of '{shown(alias)}' is not one number.", details={"module": shown(alias)})
    kinds = [kind for kind, names in _PARTS.items() if not parts.keys().isdisjoint(names)]
    tensors = _Tensors(alias, parts, header)
    if len(kinds) > 1:
        raise LoraUnusable(f"The file has two kinds of LoRA for '{shown(alias)}'.", details={"module": shown(alias)})
    if not kinds:
        if "diff_b" not in parts or not parts.keys() <= {"diff_b", "alpha"}:
            tensors.require("down", "up")
        return None
    (kind,) = kinds
    if kind is Kind.FULL and not parts.keys().isdisjoint({"dora_scale", "magnitude"}):
        tensors.require("down", "up")
    made, rank = _MAKERS[kind](tensors)
    return Change(kind, {part: parts[part] for part in _PARTS[kind] if part in parts}, squeezed(made), rank)


def _lora(tensors: _Tensors) -> tuple[Shape, int | None]:
    return tensors.convolution()


def _loha(tensors: _Tensors) -> tuple[Shape, int | None]:
    if "hada_t1" in tensors or "hada_t2" in tensors:
        tensors.require("hada_t1", "hada_t2")
    first = tensors.matrix("hada_w1_a", "hada_w1_b", "hada_t1")
    if first != tensors.matrix("hada_w2_a", "hada_w2_b", "hada_t2"):
        raise tensors.misfit("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    return first


def _lokr(tensors: _Tensors) -> tuple[Shape, int | None]:
    left, left_rank = _factor(tensors, "lokr_w1", "lokr_t1")
    right, right_rank = _factor(tensors, "lokr_w2", "lokr_t2")
    if len(left) != 2 or len(right) < 2 or (left_rank and right_rank and left_rank != right_rank):
        raise tensors.misfit(*tensors)
    return (left[0] * right[0], left[1] * right[1], *right[2:]), left_rank or right_rank


def _factor(tensors: _Tensors, whole: str, core: str) -> tuple[Shape, int | None]:
    """The shape of one factor of a Kronecker product; its rank where it is a product itself.

    Alpha scales what is decomposed alone: in LyCORIS and ComfyUI two whole factors are as they are.
    """
    first, second = f"{whole}_a", f"{whole}_b"
    if whole not in tensors:
        return tensors.matrix(first, second, core)
    if first in tensors or second in tensors or core in tensors:
        raise tensors.misfit(*tensors)
    return tensors.shape(whole), None


def _full(tensors: _Tensors) -> tuple[Shape, int | None]:
    return tensors.shape("diff"), None


_MAKERS = {Kind.LORA: _lora, Kind.LOHA: _loha, Kind.LOKR: _lokr, Kind.FULL: _full}


def squeezed(shape: Shape) -> Shape:
    """A weight's shape without a kernel of 1x1."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def fits(made: Shape, weight: Shape) -> bool:
    """Whether a change of the shape `made` is one of this weight: the kernel may be flattened into the inputs."""
    weight = squeezed(weight)
    return made == weight or (len(weight) > 2 and made == (weight[0], math.prod(weight[1:])))
