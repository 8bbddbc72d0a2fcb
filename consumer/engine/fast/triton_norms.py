"""Norms by Triton: launching `consumer.engine.fast.norm_kernels`."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from consumer.engine.fast import norm_kernels
from consumer.engine.fast.launching import Launcher

_BLOCKS = {"BLOCK_ROWS": 64, "BLOCK_CHANNELS": 64}
_PROGRAMS = 2048  # enough to fill a GPU, few enough to be merged quickly


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and sum of squared deviations of every channel in every chunk of rows, each [batch, chunks, channels]."""

    means: Tensor
    squares: Tensor
    chunk_rows: int


class Norms:
    """GroupNorm in three launches, of which the first puts its input together; LayerNorm in one."""

    def __init__(self, launch: Launcher) -> None:
        self._launch = launch

    def moments(
        self,
        out: Tensor,
        first: Tensor,
        *,
        second: Tensor | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        phases_width: int = 0,
    ) -> Moments:
        """Fills `out` with what the arguments say, unless it is `first` itself, and takes its moments."""
        batch, rows, channels = out.shape
        blocks = triton.cdiv(channels, _BLOCKS["BLOCK_CHANNELS"])
        most = max(64, _PROGRAMS // (blocks * batch))
        chunk_rows = _BLOCKS["BLOCK_ROWS"] * triton.cdiv(rows, _BLOCKS["BLOCK_ROWS"] * most)
        chunks = triton.cdiv(rows, chunk_rows)
        means, squares = out.new_empty(2, batch, chunks, channels, dtype=torch.float32)
        tensors = (first, *(first if given is None else given for given in (second, residual, bias)), out)
        from_first = channels - (0 if second is None else second.shape[2])
        self._launch(
            norm_kernels.moments,
            (blocks, chunks, batch),
            *tensors,
            means,
            squares,
            *(rows, channels, from_first, chunk_rows, phases_width or 2),
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            HAS_SECOND=second is not None,
            IS_PHASES=phases_width > 0,
            WRITES=out is not first,
            **_BLOCKS,
        )
        return Moments(means, squares, chunk_rows)

    def group_norm(
        self,
        x: Tensor,
        moments: Moments,
        weight: Tensor,
        bias: Tensor,
        *,
        groups: int,
        eps: float,
        silu: bool,
        shift: Tensor | None,
    ) -> Tensor:
        """GroupNorm of `x + shift`; the moments are those of `x`."""
        batch, rows, channels = x.shape
        scales, offsets = self._normaliser(moments, weight, bias, rows, channels // groups, eps, shift)
        out = torch.empty_like(x)
        blocks = triton.cdiv(channels, _BLOCKS["BLOCK_CHANNELS"]), triton.cdiv(rows, _BLOCKS["BLOCK_ROWS"])
        self._launch(
            norm_kernels.normalise, (*blocks, batch), x, scales, offsets, out, rows, channels, SILU=silu, **_BLOCKS
        )
        return out

    def _normaliser(
        self,
        moments: Moments,
        weight: Tensor,
        bias: Tensor,
        rows: int,
        group: int,
        eps: float,
        shift: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """What a channel is multiplied with, and what is added then: each float32 [batch, channels]."""
        batch, chunks, channels = moments.means.shape
        scales, offsets = moments.means.new_empty(2, batch, channels)
        block_group = max(16, triton.next_power_of_2(group))
        self._launch(
            norm_kernels.normaliser,
            (channels // group, batch),
            moments.means,
            moments.squares,
            moments.means if shift is None else shift,
            *(weight, bias, scales, offsets),
            *(rows, channels, moments.chunk_rows, chunks, group),
            0 if shift is None else shift.stride(0),
            eps,
            HAS_SHIFT=shift is not None,
            BLOCK_CHUNKS=4096 // block_group,
            BLOCK_GROUP=block_group,
        )
        return scales, offsets

    def layer_norm(
        self, x: Tensor, change: Tensor | None, change_bias: Tensor | None, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`x + change + change_bias`, and its LayerNorm."""
        rows, channels = x.shape
        total = x if change is None else torch.empty_like(x)
        out = torch.empty_like(x)
        self._launch(
            norm_kernels.layer_norm,
            (triton.cdiv(rows, 2),),
            x,
            x if change is None else change,
            weight if change_bias is None else change_bias,
            *(weight, bias, total, out),
            *(rows, channels),
            ADDS=change is not None,
            BLOCK_ROWS=2,
            BLOCK_CHANNELS=triton.next_power_of_2(channels),
        )
        return total, out
