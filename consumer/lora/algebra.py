"""The changes of a parameter that are no plain low-rank product: LoHa, LoKr, whole differences, and DoRA around any."""

from dataclasses import dataclass

import torch
from torch import Tensor

from consumer.lora.deltas import LowRankDelta


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix, whole ([rows, columns]) or as the product `left @ right` ([rows, rank] and [rank, columns])."""

    left: Tensor
    right: Tensor | None = None

    def on(self, device: torch.device) -> Tensor:
        """The matrix in float32."""
        left = _float32(self.left, device)
        return left if self.right is None else left @ _float32(self.right, device)


@dataclass(frozen=True, slots=True)
class HadamardDelta:
    """LoHa: `factor * first * second`, element by element (FedPara, arXiv 2108.06098).

    `first`, `second`: [outputs, inputs], where a convolution's inputs are channels * kernel height * kernel width.
    """

    module: str
    first: Matrix
    second: Matrix
    factor: float

    @property
    def part(self) -> str:
        return "weight"

    def change(self, base: Tensor) -> Tensor:
        product = self.first.on(base.device) * self.second.on(base.device)
        return product.mul_(self.factor).view(base.shape)


@dataclass(frozen=True, slots=True)
class KroneckerDelta:
    """LoKr: `factor * kron(left, right)` (KronA, arXiv 2212.10650).

    `left`: [o, i]; `right`: [outputs / o, inputs / i], where a convolution's kernel belongs to the inputs of `right`.
    """

    module: str
    left: Matrix
    right: Matrix
    factor: float

    @property
    def part(self) -> str:
        return "weight"

    def change(self, base: Tensor) -> Tensor:
        left = self.left.on(base.device) * self.factor
        return torch.kron(left, self.right.on(base.device)).view(base.shape)


@dataclass(frozen=True, slots=True)
class FullDelta:
    """`factor * difference`, of the parameter's own shape; `part`: weight or bias."""

    module: str
    part: str
    difference: Tensor
    factor: float = 1.0

    def change(self, base: Tensor) -> Tensor:
        return (_float32(self.difference, base.device) * self.factor).view(base.shape)


@dataclass(frozen=True, slots=True)
class DoraDelta:
    """DoRA: the changed weight with its rows (axis 0) or columns (axis 1) set to the lengths in `magnitude`.

    `change` is what leads there from the base (arXiv 2402.09353, equation 5). A column is all that belongs to one
    input channel, kernel included.
    """

    inner: LowRankDelta | HadamardDelta | KroneckerDelta
    magnitude: Tensor
    axis: int

    @property
    def module(self) -> str:
        return self.inner.module

    @property
    def part(self) -> str:
        return "weight"

    def change(self, base: Tensor) -> Tensor:
        changed = self.inner.change(base) + base
        others = [axis for axis in range(base.ndim) if axis != self.axis]
        lengths = torch.linalg.vector_norm(changed, dim=others, keepdim=True)
        magnitude = _float32(self.magnitude, base.device).view(lengths.shape)
        # a row of zeros has no direction, and stays one
        return changed.mul_(magnitude / lengths.clamp_min(torch.finfo(torch.float32).eps)).sub_(base)


def with_core(core: Tensor, inner: Tensor) -> Tensor:
    """What a Tucker (CP) core makes of the inner factor: float32 [rank, inputs * kernel].

    `core`: [rank, rank, kernel height, kernel width]; `inner`: [rank, inputs], whose rank is the core's second.
    """
    return torch.einsum("ij...,jr->ir...", core.float(), inner.float()).flatten(1)


def _float32(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True).float()
