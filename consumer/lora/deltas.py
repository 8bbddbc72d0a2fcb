"""What every LoRA file becomes: one low-rank delta per module."""

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Delta:
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
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def factor(self) -> float:
        """`alpha / rank`."""
        return self.alpha / self.rank


@dataclass(frozen=True, slots=True)
class ParsedLora:
    """The deltas of one file, and the names of its LoRA tensors that match no module of the model."""

    deltas: tuple[Delta, ...]
    skipped: tuple[str, ...] = ()

    def pinned(self) -> "ParsedLora":
        """The same in page-locked memory, from which a GPU copies without waiting."""
        pinned = (replace(delta, down=delta.down.pin_memory(), up=delta.up.pin_memory()) for delta in self.deltas)
        return replace(self, deltas=tuple(pinned))
