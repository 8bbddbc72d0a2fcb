"""The VAE's decoder in plain functions over channels-last tensors, in half precision without overflowing.

SDXL's decoder makes values beyond what float16 holds, which is why the stock pipeline runs it in float32. They stand
in the residual stream and between two convolutions, and from both places they go through a GroupNorm, to which their
scale is nothing. So everything there is kept divided by a power of two: the weights that write to it are divided, which
only the smallest notice, and eps with its square. What comes out is the same, up to float16's own rounding.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from consumer.engine.fast.configs import VaeConfig
from consumer.engine.fast.layers import Layers
from consumer.engine.fast.ops import Hidden, Ops

_EPS = 1e-6
_DIVISOR = 64.0
_ROWS_AT_ONCE = 4096


class Decoder:
    """Latents to pictures. `parameters`: `vae.decoder.…` and `vae.post_quant_conv.…`, which never change.

    `dtype`: what it computes in.
    """

    def __init__(self, parameters: Mapping[str, Tensor], config: VaeConfig, ops: Ops, dtype: torch.dtype) -> None:
        self._divisor = _DIVISOR if dtype == torch.float16 else 1.0
        scaled = {name: self._scaled(name, parameter).to(dtype) for name, parameter in parameters.items()}
        self._eps = _EPS / self._divisor**2
        self._layers = Layers(scaled, "vae.decoder.", ops, groups=config.groups, eps=self._eps)
        self._before = (scaled["vae.post_quant_conv.weight"].flatten(1), scaled["vae.post_quant_conv.bias"])
        self._ops = ops
        self._config = config

    @property
    def dtype(self) -> torch.dtype:
        return self._before[0].dtype

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """[height / 8, width / 8, 4] for a picture of so many pixels."""
        factor = self._config.factor
        return height // factor, width // factor, self._config.latent_channels

    def decode(self, latents: Tensor) -> Tensor:
        """The UNet's latents, float32 [1, height, width, 4], to [1, 8 * height, 8 * width, 3] of about -1..1."""
        layers = self._layers
        _, _, width, _ = latents.shape
        weight, bias = self._before
        x = functional.linear((latents / self._config.scaling_factor).flatten(1, 2).to(weight.dtype), weight, bias)
        hidden = Hidden(layers.convolve(x, width, "conv_in", bias=True), width)
        hidden = self._resnet(hidden, "mid_block.resnets.0")
        hidden = self._attend(hidden, "mid_block.attentions.0")
        hidden = self._resnet(hidden, "mid_block.resnets.1")
        for block in layers.numbered("up_blocks", "resnets.0.conv1"):
            for resnet in layers.numbered(f"{block}.resnets", "conv1"):
                hidden = self._resnet(hidden, resnet)
            if layers.has(f"{block}.upsamplers.0.conv"):
                hidden = layers.upsample(hidden, f"{block}.upsamplers.0.conv")
        x = layers.group_norm(hidden, "conv_norm_out", silu=True)
        return layers.convolve(x, hidden.width, "conv_out", bias=True).view(1, -1, hidden.width, 3)

    def _resnet(self, hidden: Hidden, name: str) -> Hidden:
        return self._layers.resnet(hidden, name, self._layers.bias(f"{name}.conv1").float()[None])

    def _attend(self, hidden: Hidden, name: str) -> Hidden:
        """One head as wide as the features, which no fused kernel takes: some rows at a time, scores in float32."""
        x = self._layers.group_norm(hidden, f"{name}.group_norm", silu=False)[0]
        query, key, value = (self._layers.linear(x, f"{name}.to_{letter}") for letter in "qkv")
        query = query * x.shape[1] ** -0.5
        mixed = [torch.softmax(_scores(rows, key), -1).to(x.dtype) @ value for rows in query.split(_ROWS_AT_ONCE)]
        x = functional.linear(torch.cat(mixed), self._layers.weight(f"{name}.to_out.0"))
        bias = self._layers.bias(f"{name}.to_out.0")
        return self._ops.join(x[None], hidden.width, bias=bias, residual=hidden.x)

    def _scaled(self, name: str, parameter: Tensor) -> Tensor:
        """Divided, in float32, if the layer writes to the residual stream or to another GroupNorm."""
        layer, part = name.rsplit(".", 1)
        writes = layer.endswith((".conv1", ".conv2", ".to_out.0", "decoder.conv_in"))
        # these read what is divided already
        passes = layer.endswith((".conv_shortcut", ".upsamplers.0.conv"))
        if writes or (passes and part == "bias"):
            parameter = parameter.float() / self._divisor
        if parameter.dim() == 4:
            parameter = parameter.contiguous(memory_format=torch.channels_last)
        return parameter


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """`query @ key.T` in float32, without having been rounded to half precision in between."""
    if query.is_cuda and query.dtype != torch.float32:
        return torch.mm(query, key.t(), out_dtype=torch.float32)
    return query.float() @ key.float().t()
