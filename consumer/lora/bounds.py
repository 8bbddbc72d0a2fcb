"""How large a change can be, told from the parts of a delta without making it."""

import math
from collections.abc import Callable
from typing import assert_never

import torch
from torch import Tensor

from consumer.lora.algebra import DoraDelta, FullDelta, HadamardDelta, KroneckerDelta, Matrix
from consumer.lora.deltas import LowRankDelta

# Beyond it a weight overflows in half precision, and the picture is NaN.
MAX_CHANGE = torch.finfo(torch.float16).max

KnownDelta = LowRankDelta | HadamardDelta | KroneckerDelta | FullDelta | DoraDelta

Norm = Callable[[Tensor, int | None], float]
"""At least the largest Euclidean length along a dimension of a matrix; without one, the largest absolute value."""


def is_small(delta: KnownDelta, norm: Norm) -> bool:
    """Whether no entry of the change can reach `MAX_CHANGE`, nor anything on the way there overflow float32."""
    return all(
        math.prod(factors) < MAX_CHANGE
        and math.prod(max(1.0, factor) for factor in factors) < torch.finfo(torch.float32).max
        for factors in _bounds(delta, norm)
    )


def longest(tensor: Tensor, dim: int | None) -> float:
    """The exact `Norm`: in float64, where the square of no float32 is 0 or Inf."""
    if dim is None:
        return float(tensor.abs().max())
    return float(torch.linalg.vector_norm(tensor, dim=dim, dtype=torch.float64).max())


def no_longer_than(largest: float) -> Norm:
    """A `Norm` for tensors without any number above `largest`, which looks at none of them."""
    return lambda tensor, dim: largest if dim is None else largest * math.sqrt(tensor.shape[dim])


def _bounds(delta: KnownDelta, norm: Norm) -> list[tuple[float, ...]]:
    """Factors: no entry of the change is larger than their product."""
    match delta:
        case LowRankDelta():  # by Cauchy-Schwarz
            return [(abs(delta.factor), norm(delta.up, 1), norm(delta.down, 0))]
        case HadamardDelta():
            return [(abs(delta.factor), *_entry(delta.first, norm), *_entry(delta.second, norm))]
        case KroneckerDelta():
            return [(abs(delta.factor), *_entry(delta.left, norm), *_entry(delta.right, norm))]
        case FullDelta():
            return [(abs(delta.factor), norm(delta.difference, None))]
        case DoraDelta():  # an entry of a row is no larger than the row is long
            return [*_bounds(delta.inner, norm), (norm(delta.magnitude, None),)]
        case _:
            assert_never(delta)


def _entry(matrix: Matrix, norm: Norm) -> tuple[float, ...]:
    if matrix.right is None:
        return (norm(matrix.left, None),)
    return norm(matrix.left, 1), norm(matrix.right, 0)
