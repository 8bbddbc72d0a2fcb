"""What every LoRA file becomes: what it changes in one parameter after the other.

A parameter is always made anew: base + the sum over LoRAs of scale * change, rounded once.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar

from torch import Tensor

AnyDelta = TypeVar("AnyDelta", bound="Delta")


class Delta(Protocol):
    """What one LoRA changes in one parameter: `module` as in `ModelShapes` (`unet.conv_in`), `part` weight or bias."""

    @property
    def module(self) -> str: ...

    @property
    def part(self) -> str: ...

    def change(self, base: Tensor) -> Tensor:
        """What a scale of 1 adds to the pristine parameter `base`: float32, of its shape, on its device.

        `base`: float32, [out, in], [out, in, kernel height, kernel width] or [out].
        """
        ...


@dataclass(frozen=True, slots=True)
class LowRankDelta:
    """`alpha / rank * up @ down`, to be added to one module's weight.

    `module`: the component and the path in it, as in `unet.conv_in`. `down`: [rank, inputs], where a convolution's
    inputs are channels * kernel height * kernel width. `up`: [outputs, rank]. Both in the file's dtype: float32,
    float16 or bfloat16.
    """

    module: str
    down: Tensor
    up: Tensor
    alpha: float

    @property
    def part(self) -> str:
        return "weight"

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def factor(self) -> float:
        """`alpha / rank`."""
        return self.alpha / self.rank

    def change(self, base: Tensor) -> Tensor:
        down, up = (half.to(base.device, non_blocking=True).float() for half in (self.down, self.up))
        return (self.factor * up @ down).view(base.shape)


@dataclass(frozen=True, slots=True)
class ParsedLora:
    """The deltas of one file, and the names of its LoRA tensors that match nothing in the model."""

    deltas: tuple[Delta, ...]
    skipped: tuple[str, ...] = ()

    @property
    def modules(self) -> int:
        """How many modules it changes: one may have a weight and a bias."""
        return len({delta.module for delta in self.deltas})


def with_tensors(delta: AnyDelta, of: Callable[[Tensor], Tensor]) -> AnyDelta:
    """The same delta with `of(tensor)` for each of its tensors: on another device, for example."""
    made: AnyDelta = _mapped(delta, of)
    return made


def _mapped(value: Any, of: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return of(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _mapped(getattr(value, field.name), of) for field in fields(value)})
    return value
