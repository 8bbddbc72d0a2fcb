"""`Ops` on a GPU: what needs to read a tensor reads it once, and norms ride along with the sums before them."""

import math
from contextlib import AbstractContextManager

import torch
import triton
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.tools.tensor_descriptor import TensorDescriptor

from consumer.engine.fast import kernels
from consumer.engine.fast.launching import Launcher
from consumer.engine.fast.ops import Hidden
from consumer.engine.fast.triton_norms import Norms

# cuDNN's attention is the quickest on Hopper; older GPUs have not all of these.
_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_TEXT_ROWS = 64
_GEGLU_ROWS, _GEGLU_WIDTH, _GEGLU_DEPTH = 128, 128, 64  # of a tile, found by measuring on an H200


class TritonOps:
    """The kernels, launched on the current stream; float16 or bfloat16.

    `has_descriptors`: whether the GPU copies tiles by itself, as from Hopper on. `multiprocessors`: how many it has.
    """

    def __init__(self, *, has_descriptors: bool, multiprocessors: int) -> None:
        self._has_descriptors = has_descriptors
        self._multiprocessors = multiprocessors
        self._launch = Launcher()
        self._norms = Norms(self._launch)

    def compiling(self) -> AbstractContextManager[None]:
        """Inside, kernels are compiled side by side instead of being launched; results mean nothing."""
        return self._launch.compiling()

    def join(self, x: Tensor, width: int, *, bias: Tensor, residual: Tensor | None = None) -> Hidden:
        out = torch.empty_like(x)
        return Hidden(out, width, self._norms.moments(out, x, bias=bias, residual=residual))

    def concat(self, first: Tensor, second: Tensor, width: int) -> Hidden:
        batch, rows, channels = first.shape
        out = first.new_empty(batch, rows, channels + second.shape[2])
        return Hidden(out, width, self._norms.moments(out, first, second=second))

    def interleave(self, phases: Tensor, width: int, *, bias: Tensor, second: Tensor | None = None) -> Hidden:
        batch, corners, channels = phases.shape
        rows = (corners // (width // 2 + 1) - 1) * 2 * width
        channels = channels // 4 + (0 if second is None else second.shape[2])
        out = phases.new_empty(batch, rows, channels)
        return Hidden(out, width, self._norms.moments(out, phases, second=second, bias=bias, phases_width=width))

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
        moments = hidden.moments or self._norms.moments(hidden.x, hidden.x)
        return self._norms.group_norm(hidden.x, moments, weight, bias, groups=groups, eps=eps, silu=silu, shift=shift)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self._norms.layer_norm(x, None, None, weight, bias)[1]

    def add_layer_norm(
        self, x: Tensor, change: Tensor, change_bias: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self._norms.layer_norm(x, change, change_bias, weight, bias)

    def geglu(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows, width = x.shape[0], weight.shape[0] // 2
        out = x.new_empty(rows, width)
        if not self._has_descriptors:
            x, blocks = functional.linear(x, weight, bias), {"BLOCK_ROWS": 4, "BLOCK_WIDTH": 512}
            self._launch(kernels.gate, (triton.cdiv(rows, 4), triton.cdiv(width, 512)), x, out, rows, width, **blocks)
            return out
        blocks = {"BLOCK_ROWS": _GEGLU_ROWS, "BLOCK_WIDTH": _GEGLU_WIDTH, "BLOCK": _GEGLU_DEPTH}
        tiles = triton.cdiv(rows, _GEGLU_ROWS) * triton.cdiv(width, _GEGLU_WIDTH)
        self._launch(
            kernels.geglu,
            (min(tiles, self._multiprocessors),),
            TensorDescriptor.from_tensor(x, [_GEGLU_ROWS, _GEGLU_DEPTH]),
            TensorDescriptor.from_tensor(weight.view(2, width, -1), [2, _GEGLU_WIDTH, _GEGLU_DEPTH]),
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
            return functional.scaled_dot_product_attention(query, key, value)

    def attend_text(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, rows, head = query.shape
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
