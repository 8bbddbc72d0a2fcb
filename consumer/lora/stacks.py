"""The model's parameters in memory: those of one shape are rows of one tensor, with a pristine twin beside it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor


class Place(NamedTuple):
    """Where a parameter lives: the number of its stack, and its row there."""

    stack: int
    row: int


@dataclass(frozen=True, slots=True)
class Stack:
    """Parameters of one shape and dtype, in rows.

    `live` and `pristine`: [rows, out, in], [rows, out] or, for convolutions, [rows, out, in, height, width]; where
    `channels_last`, those are [rows, out, height, width, in]. `sums`: int64 [rows], a checksum of each pristine row.
    """

    live: Tensor
    pristine: Tensor
    sums: Tensor
    channels_last: bool

    @classmethod
    def of(cls, parameters: Iterable[Tensor], *, channels_last: bool) -> Self:
        """Copies of the parameters, which are of one shape. Only those with four dimensions can be channels-last."""
        rows = [parameter.detach() for parameter in parameters]
        channels_last = channels_last and rows[0].dim() == 4
        live = torch.stack([row.permute(0, 2, 3, 1) for row in rows] if channels_last else rows)
        return cls(live, live.clone(), _sums(live), channels_last)

    @property
    def outputs(self) -> int:
        return self.live.shape[1]

    @property
    def inputs(self) -> int:
        """How many weights one output has; 1 where the parameters are biases."""
        return self.live[0, 0].numel()

    @property
    def row_bytes(self) -> int:
        return self.live[0].numel() * self.live.element_size()

    def shaped(self, row: Tensor) -> Tensor:
        """A row of `live` or `pristine` as the model knows it: [out, in, height, width] where it is a convolution's."""
        return row.permute(0, 3, 1, 2) if self.channels_last else row

    def copy_back(self, rows: slice) -> None:
        self.live[rows].copy_(self.pristine[rows])

    def differing(self, rows: slice) -> Tensor:
        """Which of the rows differ from the pristine ones in any bit: bool [rows]."""
        return (_words(self.live[rows]) != _words(self.pristine[rows])).any(1)

    def rotted(self, rows: slice) -> Tensor:
        """Which of the pristine rows are no longer what they were at the beginning: bool [rows]."""
        return _sums(self.pristine[rows]) != self.sums[rows]


def stacked(parameters: Mapping[str, Tensor], *, channels_last: bool) -> tuple[list[Stack], dict[str, Place]]:
    """Stacks of all parameters, in whose rows their order is kept, and each parameter's place."""
    groups: dict[tuple[torch.Size, torch.dtype], list[str]] = {}
    for name, parameter in parameters.items():
        groups.setdefault((parameter.shape, parameter.dtype), []).append(name)
    stacks = [Stack.of([parameters[name] for name in names], channels_last=channels_last) for names in groups.values()]
    places = {
        name: Place(number, row) for number, names in enumerate(groups.values()) for row, name in enumerate(names)
    }
    return stacks, places


def runs(places: Iterable[Place]) -> Iterator[tuple[int, slice]]:
    """The places as runs of adjacent rows: the number of their stack, and the rows."""
    stack = first = end = -1
    for place in sorted(places):
        if place != (stack, end):
            if stack >= 0:
                yield stack, slice(first, end)
            stack, first = place
        end = place.row + 1
    if stack >= 0:
        yield stack, slice(first, end)


def _words(rows: Tensor) -> Tensor:
    """The bits of [rows, ...] as integers, as wide as fit a row: [rows, words]."""
    flat = rows.flatten(1)
    row_bytes = flat.shape[1] * flat.element_size()
    return flat.view(next(word for word in _WORDS if row_bytes % word.itemsize == 0))


def _sums(rows: Tensor) -> Tensor:
    # Modulo 2**64, so that every single flipped bit changes it, in whatever order a device adds.
    return _words(rows).sum(1, dtype=torch.int64)


_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)
