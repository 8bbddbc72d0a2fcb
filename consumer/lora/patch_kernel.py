"""The low-rank deltas of one stack in a single pass over its weights, for GPUs. What it computes, and where it is
tested against: `patch_rows_by_torch`.
"""

import torch
import triton
import triton.language as tl

from consumer.lora.low_rank import BLOCK, PackedDeltas
from consumer.lora.stacks import Stack
from consumer.triton_support import LAUNCH_OPTIONS

TILE_OUTPUTS, TILE_INPUTS = 64, 128


def patch_rows(stack: Stack, packed: PackedDeltas) -> None:
    """Makes each of the rows its pristine one plus the deltas, summed in float32 and rounded once.

    One launch on the current stream. Rows that are not in `packed` are not looked at.
    """
    outputs, inputs = stack.outputs, stack.inputs
    tiles = triton.cdiv(outputs, TILE_OUTPUTS) * triton.cdiv(inputs, TILE_INPUTS)
    _patch_tile[tiles, len(packed.rows)](*_arguments(stack, packed), **_CONSTANTS)


def compile_ahead(stack: Stack, packed: PackedDeltas) -> None:
    """Compiles what `patch_rows` will launch, where no stack with such strides and dtypes was patched before."""
    _patch_tile.warmup(*_arguments(stack, packed), grid=(1,), **_CONSTANTS)


def _arguments(stack: Stack, packed: PackedDeltas) -> tuple[torch.Tensor | int, ...]:
    deltas = (packed.rows, packed.firsts, packed.factors, packed.down, packed.up)
    return stack.pristine, stack.live, *deltas, stack.outputs, stack.inputs


@triton.jit
def _patch_tile(
    base,
    live,
    rows,
    firsts,
    factors,
    down,
    up,
    outputs,
    inputs,
    block_ranks: tl.constexpr,
    tile_outputs: tl.constexpr,
    tile_inputs: tl.constexpr,
):  # pragma: no cover
    tile, number = tl.program_id(0), tl.program_id(1)
    tiles_across = tl.cdiv(inputs, tile_inputs)
    n = (tile // tiles_across) * tile_outputs + tl.arange(0, tile_outputs)[:, None]
    k = (tile % tiles_across) * tile_inputs + tl.arange(0, tile_inputs)[None, :]
    ranks = tl.arange(0, block_ranks)
    first = tl.load(firsts + number).to(tl.int64)
    last = tl.load(firsts + number + 1).to(tl.int64)
    width = (last - first) * block_ranks
    up_tile = up + first * block_ranks * outputs + n * width + ranks[None, :]
    down_tile = down + first * block_ranks * inputs + ranks[:, None] * inputs + k
    change = tl.zeros((tile_outputs, tile_inputs), dtype=tl.float32)
    for block in range(first, last):
        left = tl.load(up_tile, mask=n < outputs, other=0.0)
        right = tl.load(down_tile, mask=k < inputs, other=0.0)
        change += tl.load(factors + block) * tl.dot(left, right, input_precision="ieee")
        up_tile += block_ranks
        down_tile += block_ranks * inputs
    weights = tl.load(rows + number).to(tl.int64) * outputs * inputs + n * inputs + k
    inside = (n < outputs) & (k < inputs)
    weight = tl.load(base + weights, mask=inside).to(tl.float32) + change
    tl.store(live + weights, weight.to(live.dtype.element_ty), mask=inside)


_CONSTANTS = {
    "block_ranks": BLOCK,
    "tile_outputs": TILE_OUTPUTS,
    "tile_inputs": TILE_INPUTS,
    "num_warps": 4,
    **LAUNCH_OPTIONS,
}
