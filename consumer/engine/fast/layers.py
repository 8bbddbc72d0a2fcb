"""What the UNet and the decoder have in common: layers by name, over channels-last features."""

from collections.abc import Iterator, Mapping
from itertools import count

import torch
from torch import Tensor
from torch.nn import functional

from consumer.engine.fast.ops import Hidden, Ops
from consumer.engine.fast.upsampling import phase_weight


class Layers:
    """Layers whose parameters are looked up by name at every call, so that they may be patched in place.

    `prefix`: of every name, as in `unet.`. `groups`, `eps`: of the GroupNorms in resnets.
    """

    def __init__(self, parameters: Mapping[str, Tensor], prefix: str, ops: Ops, *, groups: int, eps: float) -> None:
        self.ops = ops
        self._parameters = parameters
        self._prefix = prefix
        self._groups = groups
        self._eps = eps
        self._phases = {name: phase_weight(self.weight(name)) for name in self._upsamplers()}

    def weight(self, name: str) -> Tensor:
        return self._parameters[f"{self._prefix}{name}.weight"]

    def bias(self, name: str) -> Tensor:
        return self._parameters[f"{self._prefix}{name}.bias"]

    def has(self, name: str) -> bool:
        """Whether there is a layer of this name."""
        return f"{self._prefix}{name}.weight" in self._parameters

    def numbered(self, name: str, inner: str) -> Iterator[str]:
        """`name.0`, `name.1`, ... for as long as the layer `inner` is in them."""
        for index in count():
            if not self.has(f"{name}.{index}.{inner}"):
                return
            yield f"{name}.{index}"

    @torch.no_grad()
    def refresh(self, touched: frozenset[str]) -> None:
        """Makes anew, in place, what was derived from the parameters of these names."""
        for name, phases in self._phases.items():
            if f"{self._prefix}{name}.weight" in touched:
                phases.copy_(phase_weight(self.weight(name)))

    def linear(self, x: Tensor, name: str) -> Tensor:
        """A linear layer, or a 1x1 convolution."""
        return functional.linear(x, self.weight(name).flatten(1), self.bias(name))

    def linear_without_bias(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x, self.weight(name))

    def convolve(self, x: Tensor, width: int, name: str, *, stride: int = 1, bias: bool = False) -> Tensor:
        """A 3x3 convolution of [batch, rows, channels]; without its bias, which is for the next step to add."""
        return _convolve(x, width, self.weight(name), self.bias(name) if bias else None, stride)

    def upsample(self, hidden: Hidden, name: str, second: Tensor | None = None) -> Hidden:
        """Upsampling by two with its convolution; with `second` behind the result along the channels."""
        phases = _convolve(hidden.x, hidden.width, self._phases[name], None, 1)
        return self.ops.interleave(phases, 2 * hidden.width, bias=self.bias(name), second=second)

    def group_norm(
        self, hidden: Hidden, name: str, *, silu: bool, eps: float | None = None, shift: Tensor | None = None
    ) -> Tensor:
        eps = self._eps if eps is None else eps
        weight, bias = self.weight(name), self.bias(name)
        return self.ops.group_norm(hidden, weight, bias, groups=self._groups, eps=eps, silu=silu, shift=shift)

    def resnet(self, hidden: Hidden, name: str, shift: Tensor) -> Hidden:
        """`shift`: float32 [batch, channels], what is added to the first convolution's output, its bias included."""
        width = hidden.width
        x = self.group_norm(hidden, f"{name}.norm1", silu=True)
        x = self.convolve(x, width, f"{name}.conv1")
        x = self.group_norm(Hidden(x, width), f"{name}.norm2", silu=True, shift=shift)
        x = self.convolve(x, width, f"{name}.conv2")
        shortcut = f"{name}.conv_shortcut"
        residual = self.linear(hidden.x, shortcut) if self.has(shortcut) else hidden.x
        return self.ops.join(x, width, bias=self.bias(f"{name}.conv2"), residual=residual)

    def _upsamplers(self) -> Iterator[str]:
        for name in self._parameters:
            path = name.removeprefix(self._prefix)
            if path != name and path.endswith(".upsamplers.0.conv.weight"):
                yield path.removesuffix(".weight")


def _convolve(x: Tensor, width: int, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    batch, rows, channels = x.shape
    picture = x.view(batch, rows // width, width, channels).permute(0, 3, 1, 2)
    convolved = functional.conv2d(picture, weight, bias, stride, padding=1).permute(0, 2, 3, 1)
    return convolved.reshape(batch, -1, convolved.shape[3])
