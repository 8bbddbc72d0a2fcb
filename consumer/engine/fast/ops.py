"""The steps between matrix products, as one protocol: `TorchOps` says what they are, `TritonOps` does them quickly.

Pictures are channels-last everywhere: `[batch, rows, channels]`, where `rows` is height * width. Sums are made in
float32 and rounded once. Where a method returns a `Hidden`, what its next normalisation needs may come with it.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Hidden:
    """Features: `x` is [batch, rows, channels]. `width`: in cells. `moments`: what `TritonOps` knows of it."""

    x: Tensor
    width: int
    moments: Any = None


class Ops(Protocol):
    """Everything that the UNet and the decoder do besides convolutions and linear layers."""

    def compiling(self) -> AbstractContextManager[None]:
        """Inside, what has to be compiled is compiled instead of run; results mean nothing."""
        ...

    def join(self, x: Tensor, width: int, *, bias: Tensor, residual: Tensor | None = None) -> Hidden:
        """`x + bias + residual`."""
        ...

    def concat(self, first: Tensor, second: Tensor, width: int) -> Hidden:
        """Both, one behind the other along the channels."""
        ...

    def interleave(self, phases: Tensor, width: int, *, bias: Tensor, second: Tensor | None = None) -> Hidden:
        """An upsampled convolution from its four phases, plus its bias; with `second` behind it along the channels.

        `phases`: [batch, (height / 2 + 1) * (width / 2 + 1), 4 * channels], see `consumer.engine.fast.upsampling`.
        `width`: of the result.
        """
        ...

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
        """GroupNorm of `x + shift`, then SiLU if asked for. `shift`: float32 [batch, channels]."""
        ...

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """LayerNorm along the last dimension, with the usual eps of 1e-5."""
        ...

    def add_layer_norm(
        self, x: Tensor, change: Tensor, change_bias: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`x + change + change_bias`, and its LayerNorm."""
        ...

    def geglu(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """A linear layer of [rows, in] with 2 * out outputs, the second half gating the first: `value * gelu(gate)`."""
        ...

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Softmax attention of a picture to itself, all [batch, heads, rows, head width]."""
        ...

    def attend_text(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same to a text of at most 80 tokens."""
        ...

    def euler(
        self,
        noise: Tensor,
        latents: Tensor,
        inputs: Tensor,
        sigmas: Tensor,
        index: Tensor,
        guidance: Tensor,
    ) -> None:
        """One step of Euler's method with classifier-free guidance, in place; prepares the next step's `inputs`.

        `noise`: what the UNet predicted, [batch, height, width, channels], where a batch of 2 is the negative and the
        positive prompt. `latents`: float32 [1, height, width, channels]. `index`: the step's number, int64 [1].
        `guidance`: float32 [1]. Source: Karras et al. 2022, algorithm 2 without churn.
        """
        ...


class TorchOps:
    """What each step is, in plain torch: for CPUs, and what the kernels are compared with."""

    def compiling(self) -> AbstractContextManager[None]:
        return nullcontext()

    def join(self, x: Tensor, width: int, *, bias: Tensor, residual: Tensor | None = None) -> Hidden:
        total = x.float() + bias.float()
        if residual is not None:
            total += residual.float()
        return Hidden(total.to(x.dtype), width)

    def concat(self, first: Tensor, second: Tensor, width: int) -> Hidden:
        return Hidden(torch.cat([first, second], -1), width)

    def interleave(self, phases: Tensor, width: int, *, bias: Tensor, second: Tensor | None = None) -> Hidden:
        batch, _, channels = phases.shape
        channels, half = channels // 4, width // 2
        corners = phases.view(batch, -1, half + 1, 2, 2, channels)
        height = corners.shape[1] - 1
        picture = phases.new_empty(batch, 2 * height, width, channels)
        for y in (0, 1):
            for x in (0, 1):
                picture[:, y::2, x::2] = corners[:, y : y + height, x : x + half, y, x]
        joined = self.join(picture.view(batch, -1, channels), width, bias=bias)
        return joined if second is None else self.concat(joined.x, second, width)

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
        x = hidden.x.float()
        if shift is not None:
            x = x + shift[:, None, :]
        x = functional.group_norm(x.transpose(1, 2), groups, weight.float(), bias.float(), eps).transpose(1, 2)
        return (functional.silu(x) if silu else x).to(hidden.x.dtype).contiguous()

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float()).to(x.dtype)

    def add_layer_norm(
        self, x: Tensor, change: Tensor, change_bias: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        total = (x.float() + change.float() + change_bias.float()).to(x.dtype)
        return total, self.layer_norm(total, weight, bias)

    def geglu(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        value, gate = functional.linear(x, weight, bias).float().chunk(2, -1)
        return (value * functional.gelu(gate)).to(x.dtype)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(query, key, value)

    attend_text = attend

    def euler(
        self,
        noise: Tensor,
        latents: Tensor,
        inputs: Tensor,
        sigmas: Tensor,
        index: Tensor,
        guidance: Tensor,
    ) -> None:
        step = int(index)
        predicted = noise[:1].float()
        if noise.shape[0] == 2:
            predicted = predicted + guidance * (noise[1:].float() - predicted)
        latents += predicted * (sigmas[step + 1] - sigmas[step])
        inputs.copy_((latents / (sigmas[step + 1] ** 2 + 1).sqrt()).expand_as(inputs))
