"""Low-rank deltas of many parameters as one buffer, which a single copy takes to a GPU, and what they do to a stack."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from consumer.lora.deltas import LowRankDelta
from consumer.lora.stacks import Stack

BLOCK = 16  # ranks that have one factor: what a tensor core multiplies at once
_ALIGNMENT = 256  # bytes

Parts = Sequence[tuple[LowRankDelta, float]]


@dataclass(frozen=True, slots=True)
class PackedDeltas:
    """What changes in some rows of one stack: `factor * up @ down`, summed over blocks of 16 ranks.

    `rows`: int32 [m]. Row `rows[i]` has the blocks `firsts[i]` to `firsts[i + 1]`; `firsts`: int32 [m + 1].
    `factors`: float32 [blocks]. `down`: [blocks * 16, in]. `up`: flat, for each row [out, its blocks * 16]. Both are
    float16, bfloat16 or float32; ranks that fill a block up are zeros.
    """

    stack: int
    rows: Tensor
    firsts: Tensor
    factors: Tensor
    down: Tensor
    up: Tensor


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the tensors of one stack's deltas lie in a buffer: from byte `start` on."""

    stack: int
    start: int
    rows: int
    blocks: int
    outputs: int
    inputs: int
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.start + sum(_aligned(prod(shape) * dtype.itemsize) for dtype, shape in self._tensors())

    def packed(self, buffer: Tensor) -> PackedDeltas:
        return PackedDeltas(self.stack, *self._views(buffer))

    def _views(self, buffer: Tensor) -> Iterator[Tensor]:
        start = self.start
        for dtype, shape in self._tensors():
            size = prod(shape) * dtype.itemsize
            yield buffer[start : start + size].view(dtype).view(shape)
            start += _aligned(size)

    def _tensors(self) -> Iterator[tuple[torch.dtype, tuple[int, ...]]]:
        ranks = self.blocks * BLOCK
        yield torch.int32, (self.rows,)
        yield torch.int32, (self.rows + 1,)
        yield torch.float32, (self.blocks,)
        yield self.dtype, (ranks, self.inputs)
        yield self.dtype, (ranks * self.outputs,)


class DeltaBuffer:
    """One buffer with the low-rank deltas of every stack, in page-locked memory if `pin`.

    `changes`: by the number of a stack, the parts of each of its rows, which are LoRAs' deltas with their scales.
    """

    def __init__(self, changes: Mapping[int, Mapping[int, Parts]], stacks: Sequence[Stack], *, pin: bool) -> None:
        self._layouts: list[_Layout] = []
        end = 0
        for number, rows in changes.items():
            self._layouts.append(_layout(number, stacks[number], rows, end))
            end = self._layouts[-1].end
        # Page-locked memory comes from torch's cache after the first time; it knows which copies are under way.
        self.bytes = torch.empty(end, dtype=torch.uint8, pin_memory=pin and end > 0)
        for packed, rows in zip(self.packed(self.bytes), changes.values(), strict=True):
            _fill(packed, stacks[packed.stack], rows)

    def packed(self, buffer: Tensor) -> tuple[PackedDeltas, ...]:
        """The deltas as they lie in `buffer`, which is `bytes` or a copy of it."""
        return tuple(layout.packed(buffer) for layout in self._layouts)


def patch_rows_by_torch(stack: Stack, packed: PackedDeltas) -> None:
    """Makes each of the rows its pristine one plus the deltas, summed in float32 and rounded once."""
    firsts = packed.firsts.tolist()
    for number, row in enumerate(packed.rows.tolist()):
        ranks = slice(firsts[number] * BLOCK, firsts[number + 1] * BLOCK)
        up = packed.up[ranks.start * stack.outputs : ranks.stop * stack.outputs].view(stack.outputs, -1)
        factors = packed.factors[firsts[number] : firsts[number + 1]].repeat_interleave(BLOCK)
        base = stack.pristine[row].float().view(stack.outputs, -1)
        weight = torch.addmm(base, up.float() * factors, packed.down[ranks].float())
        stack.live[row].copy_(weight.view_as(stack.live[row]))


def _layout(number: int, stack: Stack, rows: Mapping[int, Parts], start: int) -> _Layout:
    deltas = [delta for parts in rows.values() for delta, _ in parts]
    dtypes = {half.dtype for delta in deltas for half in (delta.down, delta.up)}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    blocks = sum(_blocks(delta) for delta in deltas)
    return _Layout(number, start, len(rows), blocks, stack.outputs, stack.inputs, dtype)


def _fill(packed: PackedDeltas, stack: Stack, rows: Mapping[int, Parts]) -> None:
    packed.rows.copy_(torch.tensor(list(rows)))
    firsts, factors = [0], []
    for parts in rows.values():
        first = firsts[-1]
        firsts.append(first + sum(_blocks(delta) for delta, _ in parts))
        ranks = slice(first * BLOCK, firsts[-1] * BLOCK)
        down = packed.down[ranks]
        up = packed.up[ranks.start * stack.outputs : ranks.stop * stack.outputs].view(stack.outputs, -1)
        at = 0
        for delta, scale in parts:
            blocks = _blocks(delta)
            factors += [scale * delta.factor] * blocks
            _fill_block(down[at : at + blocks * BLOCK], up[:, at : at + blocks * BLOCK], delta, stack)
            at += blocks * BLOCK
    packed.firsts.copy_(torch.tensor(firsts))
    packed.factors.copy_(torch.tensor(factors))


def _fill_block(down: Tensor, up: Tensor, delta: LowRankDelta, stack: Stack) -> None:
    rank = delta.rank
    if stack.channels_last:
        _, _, height, width, channels = stack.live.shape
        ordered = delta.down.view(rank, channels, height, width).permute(0, 2, 3, 1)
        down[:rank].view(rank, height, width, channels).copy_(ordered)
    else:
        down[:rank].copy_(delta.down)
    up[:, :rank].copy_(delta.up)
    if rank < len(down):
        down[rank:].zero_()
        up[:, rank:].zero_()


def _blocks(delta: LowRankDelta) -> int:
    return -(-delta.rank // BLOCK)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
