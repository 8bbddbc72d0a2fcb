"""`Ops` on a GPU: what needs to read a tensor reads it once, and norms ride along with the sums before them."""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.tools.tensor_descriptor import TensorDescriptor

from consumer.engine.fast import kernels, norm_kernels
from consumer.engine.fast.launching import Launcher
from consumer.engine.fast.ops import Hidden

# cuDNN's attention is the quickest on Hopper; older GPUs have not all of these.
_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_BLOCK_ROWS = 64
_BLOCK_CHANNELS = 64
_PROGRAMS = 2048  # enough to fill a GPU, few enough to be merged quickly
_TEXT_ROWS = 128
_MAX_TOKENS = 80
_GEGLU_ROWS, _GEGLU_WIDTH, _GEGLU_DEPTH = 128, 128, 64  # of a tile, found by measuring on an H200


@dataclass(frozen=True, slots=True)
class _Moments:
    """Mean and sum of squared deviations of every channel in every chunk of rows, each [batch, chunks, channels]."""

    means: Tensor
    squares: Tensor
    chunk_rows: int


class TritonOps:
    """The kernels, launched on the current stream; float16 or bfloat16.

    `has_descriptors`: whether the GPU copies tiles by itself, as from Hopper on.
    """

    def __init__(self, *, has_descriptors: bool) -> None:
        self._has_descriptors = has_descriptors
        self._launch = Launcher()

    def compiling(self) -> AbstractContextManager[None]:
        """Inside, kernels are compiled side by side instead of being launched; results mean nothing."""
        return self._launch.compiling()

    def join(self, x: Tensor, width: int, *, bias: Tensor, residual: Tensor | None = None) -> Hidden:
        out = torch.empty_like(x)
        return Hidden(out, width, self._moments(out, x, bias=bias, residual=residual))

    def concat(self, first: Tensor, second: Tensor, width: int) -> Hidden:
        batch, rows, channels = first.shape
        out = first.new_empty(batch, rows, channels + second.shape[2])
        return Hidden(out, width, self._moments(out, first, second=second))

    def interleave(self, phases: Tensor, width: int, *, bias: Tensor, second: Tensor | None = None) -> Hidden:
        batch, corners, channels = phases.shape
        rows = (corners // (width // 2 + 1) - 1) * 2 * width
        channels = channels // 4 + (0 if second is None else second.shape[2])
        out = phases.new_empty(batch, rows, channels)
        return Hidden(out, width, self._moments(out, phases, second=second, bias=bias, phases_width=width))

    def group_norm(
        self,
        hidden: Hidden,
        weight: Tensor,
        bias: Tensor,
        *,
        groups: int,
        eps: float,
        silu: bool,
        shift: Tensor | None = None,
    ) -> Tensor:
        x = hidden.x
        batch, rows, channels = x.shape
        moments = hidden.moments or self._moments(x, x)
        normalisers = x.new_empty(2, batch, channels, dtype=torch.float32)
        group = channels // groups
        block_group = max(16, triton.next_power_of_2(group))
        self._launch(
            norm_kernels.normaliser,
            (groups, batch),
            moments.means,
            moments.squares,
            moments.means if shift is None else shift,
            weight,
            bias,
            normalisers[0],
            normalisers[1],
            rows,
            channels,
            moments.chunk_rows,
            moments.means.shape[1],
            group,
            0 if shift is None else shift.stride(0),
            eps,
            HAS_SHIFT=shift is not None,
            BLOCK_CHUNKS=4096 // block_group,
            BLOCK_GROUP=block_group,
        )
        out = torch.empty_like(x)
        grid = (triton.cdiv(channels, _BLOCK_CHANNELS), triton.cdiv(rows, _BLOCK_ROWS), batch)
        blocks = {"BLOCK_ROWS": _BLOCK_ROWS, "BLOCK_CHANNELS": _BLOCK_CHANNELS}
        self._launch(
            norm_kernels.normalise, grid, x, normalisers[0], normalisers[1], out, rows, channels, SILU=silu, **blocks
        )
        return out

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self._layer_norm(x, None, None, weight, bias)[1]

    def add_layer_norm(
        self, x: Tensor, change: Tensor, change_bias: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self._layer_norm(x, change, change_bias, weight, bias)

    def geglu(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows, width = x.shape[0], weight.shape[0] // 2
        out = x.new_empty(rows, width)
        if not self._has_descriptors:
            x, blocks = F.linear(x, weight, bias), {"BLOCK_ROWS": 4, "BLOCK_WIDTH": 512}
            self._launch(kernels.gate, (triton.cdiv(rows, 4), triton.cdiv(width, 512)), x, out, rows, width, **blocks)
            return out
        blocks = {"BLOCK_ROWS": _GEGLU_ROWS, "BLOCK_WIDTH": _GEGLU_WIDTH, "BLOCK": _GEGLU_DEPTH}
        grid = (triton.cdiv(rows, _GEGLU_ROWS) * triton.cdiv(width, _GEGLU_WIDTH),)
        self._launch(
            kernels.geglu,
            grid,
            TensorDescriptor.from_tensor(x, [_GEGLU_ROWS, _GEGLU_DEPTH]),
            TensorDescriptor.from_tensor(weight, [_GEGLU_WIDTH, _GEGLU_DEPTH]),
            bias,
            TensorDescriptor.from_tensor(out, [_GEGLU_ROWS, _GEGLU_WIDTH]),
            rows,
            width,
            x.shape[1],
            **blocks,
            num_warps=8,
            num_stages=4,
        )
        return out

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(_BACKENDS, set_priority=True):
            return F.scaled_dot_product_attention(query, key, value)

    def attend_text(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, rows, head = query.shape
        if key.shape[2] > _MAX_TOKENS:
            return self.attend(query, key, value)
        out = query.new_empty(batch, rows, heads, head)
        grid = (triton.cdiv(rows, _TEXT_ROWS), heads, batch)
        self._launch(
            kernels.attend_text,
            grid,
            query,
            key,
            value,
            out,
            query.stride(0),
            query.stride(2),
            key.stride(0),
            key.stride(2),
            rows,
            key.shape[2],
            math.log2(math.e) / math.sqrt(head),
            HEAD=head,
            BLOCK_ROWS=_TEXT_ROWS,
        )
        return out.transpose(1, 2)

    def euler(
        self,
        noise: Tensor,
        latents: Tensor,
        inputs: Tensor,
        sigmas: Tensor,
        index: Tensor,
        guidance: Tensor,
    ) -> None:
        size = latents.numel()
        self._launch(
            kernels.euler,
            (triton.cdiv(size, 1024),),
            noise,
            latents,
            inputs,
            sigmas,
            index,
            guidance,
            size,
            GUIDED=inputs.shape[0] == 2,
            BLOCK=1024,
        )

    def _moments(
        self,
        out: Tensor,
        first: Tensor,
        *,
        second: Tensor | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        phases_width: int = 0,
    ) -> _Moments:
        """Fills `out` with what the arguments say, unless it is `first` itself, and takes its moments."""
        batch, rows, channels = out.shape
        blocks = triton.cdiv(channels, _BLOCK_CHANNELS)
        most = max(64, _PROGRAMS // (blocks * batch))
        chunk_rows = _BLOCK_ROWS * triton.cdiv(rows, _BLOCK_ROWS * most)
        chunks = triton.cdiv(rows, chunk_rows)
        found = out.new_empty(2, batch, chunks, channels, dtype=torch.float32)
        self._launch(
            norm_kernels.moments,
            (blocks, chunks, batch),
            first,
            first if second is None else second,
            first if residual is None else residual,
            first if bias is None else bias,
            out,
            found[0],
            found[1],
            rows,
            channels,
            channels - (0 if second is None else second.shape[2]),
            chunk_rows,
            phases_width or 2,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            HAS_SECOND=second is not None,
            IS_PHASES=phases_width > 0,
            WRITES=out is not first,
            BLOCK_ROWS=_BLOCK_ROWS,
            BLOCK_CHANNELS=_BLOCK_CHANNELS,
        )
        return _Moments(found[0], found[1], chunk_rows)

    def _layer_norm(
        self, x: Tensor, change: Tensor | None, change_bias: Tensor | None, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows, channels = x.shape
        total = x if change is None else torch.empty_like(x)
        out = torch.empty_like(x)
        self._launch(
            norm_kernels.layer_norm,
            (triton.cdiv(rows, 2),),
            x,
            x if change is None else change,
            weight if change_bias is None else change_bias,
            weight,
            bias,
            total,
            out,
            rows,
            channels,
            ADDS=change is not None,
            BLOCK_ROWS=2,
            BLOCK_CHANNELS=triton.next_power_of_2(channels),
        )
        return total, out
